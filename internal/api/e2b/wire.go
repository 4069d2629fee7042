package e2b

import (
	"encoding/json"
	"maps"
	"time"

	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// contractVersion is the version of the agent contract that is reported where no sandbox can be asked: clients refuse
// templates without one.
const contractVersion = "0.6.13"

// newSandbox is the body of both creates. Fields that are not here are ignored; so is mcp, since it is the client that
// starts the gateway, with a command inside.
type newSandbox struct {
	TemplateID          string            `json:"templateID"`
	Timeout             *int64            `json:"timeout"`
	Metadata            map[string]string `json:"metadata"`
	EnvVars             map[string]string `json:"envVars"`
	Secure              bool              `json:"secure"`
	AllowInternetAccess *bool             `json:"allow_internet_access"`
	AutoPause           bool              `json:"autoPause"`
	AutoPauseMemory     *bool             `json:"autoPauseMemory"`
	AutoResume          struct {
		Enabled bool `json:"enabled"`
	} `json:"autoResume"`
	// IdleTimeout is not of the contract: the timeout counts from the sandbox's last use.
	IdleTimeout  bool              `json:"idleTimeout"`
	VolumeMounts []json.RawMessage `json:"volumeMounts"`
	IAM          struct {
		Tokens map[string]json.RawMessage `json:"tokens"`
	} `json:"iam"`
	Network network `json:"network"`
}

// network is the part of a sandbox's network that a client chooses.
type network struct {
	AllowOut           []string                   `json:"allowOut"`
	DenyOut            []string                   `json:"denyOut"`
	Rules              map[string]json.RawMessage `json:"rules"`
	EgressProxy        map[string]json.RawMessage `json:"egressProxy"`
	AllowPublicTraffic *bool                      `json:"allowPublicTraffic"`
	MaskRequestHost    string                     `json:"maskRequestHost"`
	HTTPSPorts         []int64                    `json:"httpsPorts"`
}

// sandboxWire answers a create and a connect.
type sandboxWire struct {
	SandboxID          string  `json:"sandboxID"`
	TemplateID         string  `json:"templateID"`
	Alias              string  `json:"alias,omitempty"`
	ClientID           string  `json:"clientID"`
	EnvdVersion        string  `json:"envdVersion"`
	EnvdAccessToken    string  `json:"envdAccessToken,omitempty"`
	TrafficAccessToken *string `json:"trafficAccessToken"`
	Domain             *string `json:"domain"`
}

// listedWire is an entry of a list.
type listedWire struct {
	SandboxID    string            `json:"sandboxID"`
	TemplateID   string            `json:"templateID"`
	Alias        string            `json:"alias,omitempty"`
	ClientID     string            `json:"clientID"`
	StartedAt    time.Time         `json:"startedAt"`
	EndAt        time.Time         `json:"endAt"`
	CPUCount     int64             `json:"cpuCount"`
	MemoryMB     int64             `json:"memoryMB"`
	DiskSizeMB   int64             `json:"diskSizeMB"`
	State        string            `json:"state"`
	EnvdVersion  string            `json:"envdVersion"`
	Metadata     map[string]string `json:"metadata"`
	VolumeMounts []struct{}        `json:"volumeMounts"`
}

// detailWire answers a get.
type detailWire struct {
	listedWire
	// Reason says why a sandbox failed or was lost; the contract has no field for it, and its clients ignore it.
	Reason              string        `json:"reason,omitempty"`
	EnvdAccessToken     string        `json:"envdAccessToken,omitempty"`
	Domain              *string       `json:"domain"`
	AllowInternetAccess bool          `json:"allowInternetAccess"`
	Network             networkWire   `json:"network"`
	Lifecycle           lifecycleWire `json:"lifecycle"`
}

type networkWire struct {
	AllowOut           []string `json:"allowOut,omitempty"`
	DenyOut            []string `json:"denyOut,omitempty"`
	AllowPublicTraffic bool     `json:"allowPublicTraffic"`
}

type lifecycleWire struct {
	OnTimeout  string `json:"onTimeout"`
	AutoResume bool   `json:"autoResume"`
	// IdleTimeout is not of the contract: EndAt moves with the sandbox's use.
	IdleTimeout bool `json:"idleTimeout,omitempty"`
}

const mib = 1 << 20

// farFuture stands for "never" where the contract wants a time.
func farFuture() time.Time { return time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }

// stamp cuts a time to the microseconds that every client's date parser reads.
func stamp(t time.Time) time.Time {
	if t.IsZero() {
		return farFuture()
	}
	return t.UTC().Truncate(time.Microsecond)
}

func cpus(milli int64) int64 { return max(1, (milli+999)/1000) }

func (s *server) sandboxToWire(b sandbox.Sandbox) sandboxWire {
	return sandboxWire{
		SandboxID: string(b.ID), TemplateID: string(b.TemplateID), Alias: b.TemplateName, ClientID: string(b.NodeID),
		EnvdVersion: guestVersion(b), EnvdAccessToken: s.control.AccessToken(b), Domain: s.domain,
	}
}

func guestVersion(b sandbox.Sandbox) string {
	if b.GuestVersion == "" {
		return contractVersion
	}
	return b.GuestVersion
}

// endAt is when a sandbox ends or, of one that is paused, when it stopped running.
func endAt(b sandbox.Sandbox) time.Time {
	if b.State == sandbox.StatePaused && !b.PausedAt.IsZero() {
		return stamp(b.PausedAt)
	}
	return stamp(b.EndAt)
}

func listedToWire(b sandbox.Sandbox) listedWire {
	w := listedWire{
		SandboxID: string(b.ID), TemplateID: string(b.TemplateID), Alias: b.TemplateName, ClientID: string(b.NodeID),
		StartedAt: stamp(b.StartedAt), EndAt: endAt(b), CPUCount: cpus(b.Resources.MilliCPU),
		MemoryMB: b.Resources.MemoryBytes / mib, DiskSizeMB: b.Resources.DiskBytes / mib, State: stateToWire(b.State),
		EnvdVersion: guestVersion(b), Metadata: b.Metadata, VolumeMounts: []struct{}{},
	}
	if w.Metadata == nil {
		w.Metadata = map[string]string{}
	}
	return w
}

// stateToWire maps what is on its way to where it comes from or goes: the contract knows running and paused. Sandboxes
// that have ended by themselves keep their own word, which clients treat as "not running".
func stateToWire(s sandbox.State) string {
	switch s {
	case sandbox.StateCreating, sandbox.StateRunning, sandbox.StatePausing, sandbox.StateMigrating:
		return string(sandbox.StateRunning)
	case sandbox.StatePaused, sandbox.StateResuming:
		return string(sandbox.StatePaused)
	case sandbox.StateStopping, sandbox.StateStopped, sandbox.StateLost, sandbox.StateFailed, sandbox.StateDeleted:
	}
	return string(s)
}

func (s *server) detailToWire(b sandbox.Sandbox) detailWire {
	w := detailWire{
		listedWire: listedToWire(b), Reason: b.Reason, EnvdAccessToken: s.control.AccessToken(b), Domain: s.domain,
		AllowInternetAccess: b.AllowInternet, Network: networkWire{AllowPublicTraffic: true},
		Lifecycle: lifecycleWire{OnTimeout: "kill", AutoResume: b.AutoResume, IdleTimeout: b.IdleTimeout},
	}
	if b.AutoPause {
		w.Lifecycle.OnTimeout = "pause"
	}
	if !b.AllowInternet {
		w.Network.DenyOut = []string{allTraffic}
	}
	return w
}

type metricWire struct {
	Timestamp     time.Time `json:"timestamp"`
	TimestampUnix int64     `json:"timestampUnix"`
	CPUCount      int64     `json:"cpuCount"`
	CPUUsedPct    float64   `json:"cpuUsedPct"`
	MemUsed       int64     `json:"memUsed"`
	MemTotal      int64     `json:"memTotal"`
	MemCache      int64     `json:"memCache"`
	DiskUsed      int64     `json:"diskUsed"`
	DiskTotal     int64     `json:"diskTotal"`
}

func metricToWire(s control.Sample) metricWire {
	return metricWire{
		Timestamp: stamp(s.Time), TimestampUnix: s.Time.Unix(), CPUCount: s.CPUCount, CPUUsedPct: s.CPUUsedPercent,
		MemUsed: s.MemoryUsedBytes, MemTotal: s.MemoryTotalBytes, MemCache: s.MemoryCacheBytes,
		DiskUsed: s.DiskUsedBytes, DiskTotal: s.DiskTotalBytes,
	}
}

type logWire struct {
	Timestamp time.Time         `json:"timestamp"`
	Level     string            `json:"level"`
	Message   string            `json:"message"`
	Fields    map[string]string `json:"fields"`
}

// lineWire is a log entry as the older form has it: line is itself JSON.
type lineWire struct {
	Timestamp time.Time `json:"timestamp"`
	Line      string    `json:"line"`
}

func logToWire(e control.LogEntry) logWire {
	fields := make(map[string]string, len(e.Fields)+1)
	maps.Copy(fields, e.Fields)
	if e.Logger != "" {
		fields["logger"] = e.Logger
	}
	return logWire{Timestamp: stamp(e.Time), Level: e.Level, Message: e.Message, Fields: fields}
}

func lineToWire(e control.LogEntry) (lineWire, error) {
	line := make(map[string]string, len(e.Fields)+3)
	maps.Copy(line, e.Fields)
	line["level"], line["logger"], line["message"] = e.Level, e.Logger, e.Message
	text, err := json.Marshal(line)
	return lineWire{Timestamp: stamp(e.Time), Line: string(text)}, err
}
