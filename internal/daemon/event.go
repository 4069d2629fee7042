package daemon

import (
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

// Event is one thing to tell whoever started the daemon, until it is ready.
type Event struct {
	// Step is what is under way, Fraction how much of the whole is done (0 to 1).
	Step     string  `json:"step,omitempty"`
	Fraction float64 `json:"fraction,omitempty"`
	// Message is a line worth keeping.
	Message string `json:"message,omitempty"`
	// Ready is set on the last event.
	Ready *Ready `json:"ready,omitempty"`
}

// Ready is what a person needs once the daemon runs.
type Ready struct {
	APIURL   string `json:"api_url"`
	ProxyURL string `json:"proxy_url"`
	// KeyFile holds the admin key; AdminKey is set only on the start that made it.
	KeyFile  string `json:"key_file"`
	AdminKey string `json:"admin_key,omitempty"`
	// Sandbox ran Command, which said Output: the proof that all of it works.
	Sandbox string `json:"sandbox"`
	Command string `json:"command"`
	Output  string `json:"output"`
	// NoRoom says why no sandbox was tried, where the machine is full.
	NoRoom string `json:"no_room,omitempty"`
	// Member is set on a machine that joined a cluster; everything above but ProxyURL is then empty.
	Member *client.Member `json:"member,omitempty"`
	Took   time.Duration  `json:"took_ns"`
}
