package v1

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) pauseSandbox(w http.ResponseWriter, r *http.Request) error {
	var body client.PauseSandbox
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	box, err := s.control.Pause(r.Context(), id, sandbox.CheckpointKind(body.Kind))
	if err != nil {
		return err
	}
	return s.oneSandbox(w, http.StatusOK, box)
}

// resumeSandbox answers one that runs as it is: asking twice does no harm.
func (s *server) resumeSandbox(w http.ResponseWriter, r *http.Request) error {
	var body client.ResumeSandbox
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	life, err := lifetimeOrDefault(body.TimeoutSeconds)
	if err != nil {
		return err
	}
	box, _, err := s.control.Connect(r.Context(), id, control.ConnectRequest{Timeout: life, Cold: body.Cold})
	if err != nil {
		return err
	}
	return s.oneSandbox(w, http.StatusOK, box)
}

func (s *server) forkSandbox(w http.ResponseWriter, r *http.Request) error {
	var body client.ForkSandbox
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	if body.Count == 0 {
		body.Count = 1
	}
	life, err := lifetimeOrDefault(body.TimeoutSeconds)
	if err != nil {
		return err
	}
	forks, err := s.control.Fork(r.Context(), id, control.ForkRequest{Count: body.Count, Timeout: life})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusCreated, each(forks, s.forkToWire))
}

func (s *server) forkToWire(f control.Fork) client.Fork {
	if f.Err != nil {
		return client.Fork{Error: &client.Error{Code: exchange.Status(f.Err), Message: exchange.Message(f.Err)}}
	}
	box := sandboxToWire(f.Sandbox)
	box.AccessToken = s.control.AccessToken(f.Sandbox)
	return client.Fork{Sandbox: &box}
}

func (s *server) rollbackSandbox(w http.ResponseWriter, r *http.Request) error {
	var body client.RollbackSandbox
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	box, err := s.control.Rollback(r.Context(), id, body.Snapshot)
	if err != nil {
		return err
	}
	return s.oneSandbox(w, http.StatusOK, box)
}
