package e2b

import (
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// kind is the contract's word for what a checkpoint keeps: memory, which is the default, or files alone.
func kind(memory *bool) sandbox.CheckpointKind {
	if memory != nil && !*memory {
		return sandbox.CheckpointFiles
	}
	return sandbox.CheckpointMemory
}

func (s *server) pause(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Memory *bool `json:"memory"`
	}
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	if _, err := s.control.Pause(r.Context(), id, kind(body.Memory)); err != nil {
		return err
	}
	return exchange.Empty(w)
}

// connectBody is the body of both connects and of a resume. Without memory a paused sandbox boots anew.
type connectBody struct {
	Timeout *int64 `json:"timeout"`
	Memory  *bool  `json:"memory"`
	// AutoPause counts in a resume alone.
	AutoPause *bool `json:"autoPause"`
}

func (b connectBody) request() (control.ConnectRequest, error) {
	life, err := lifetime("timeout", *b.Timeout)
	return control.ConnectRequest{Timeout: life, Cold: b.Memory != nil && !*b.Memory}, err
}

func (s *server) connect(w http.ResponseWriter, r *http.Request) error {
	body := connectBody{}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	if body.Timeout == nil {
		body.Timeout = new(int64(defaultTimeout))
	}
	return s.connectFor(w, r, body)
}

func (s *server) connectOld(w http.ResponseWriter, r *http.Request) error {
	var body connectBody
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	if body.Timeout == nil {
		return sandbox.Invalidf("timeout is missing: want a number of seconds")
	}
	return s.connectFor(w, r, body)
}

// connectFor answers 200 for a sandbox that runs already, whose life it only ever extends, and 201 for one that it resumed.
func (s *server) connectFor(w http.ResponseWriter, r *http.Request, body connectBody) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	req, err := body.request()
	if err != nil {
		return err
	}
	box, resumed, err := s.control.Connect(r.Context(), id, req)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if resumed {
		status = http.StatusCreated
	}
	return exchange.JSON(w, status, s.sandboxToWire(box))
}

// resume is the older connect, for paused sandboxes alone.
func (s *server) resume(w http.ResponseWriter, r *http.Request) error {
	body := connectBody{}
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	if body.Timeout == nil {
		body.Timeout = new(int64(defaultTimeoutOld))
	}
	req, err := body.request()
	if err != nil {
		return err
	}
	req.AutoPause = body.AutoPause
	box, err := s.control.Resume(r.Context(), id, req)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusCreated, s.sandboxToWire(box))
}

// forkWire is one outcome: either of the two is set.
type forkWire struct {
	Sandbox *sandboxWire   `json:"sandbox,omitempty"`
	Error   *forkErrorWire `json:"error,omitempty"`
}

type forkErrorWire struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func (s *server) fork(w http.ResponseWriter, r *http.Request) error {
	body := struct {
		Count   *int64 `json:"count"`
		Timeout *int64 `json:"timeout"`
	}{}
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	req := control.ForkRequest{Count: 1, Timeout: defaultTimeoutOld * time.Second}
	if body.Count != nil {
		if *body.Count < 1 || *body.Count > control.MaxForks {
			return sandbox.Invalidf("count %d: want 1 to %d", *body.Count, control.MaxForks)
		}
		req.Count = int(*body.Count)
	}
	if body.Timeout != nil {
		if req.Timeout, err = lifetime("timeout", *body.Timeout); err != nil {
			return err
		}
	}
	forks, err := s.control.Fork(r.Context(), id, req)
	if err != nil {
		return err
	}
	out := make([]forkWire, 0, len(forks))
	for _, f := range forks {
		out = append(out, s.forkToWire(f))
	}
	return exchange.JSON(w, http.StatusCreated, out)
}

func (s *server) forkToWire(f control.Fork) forkWire {
	if f.Err != nil {
		return forkWire{Error: &forkErrorWire{Code: exchange.Status(f.Err), Message: exchange.Message(f.Err)}}
	}
	box := s.sandboxToWire(f.Sandbox)
	return forkWire{Sandbox: &box}
}
