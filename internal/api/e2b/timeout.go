package e2b

import (
	"errors"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// defaultRefresh is how long a sandbox lives at least after a refresh that names nothing, in seconds.
const defaultRefresh = 15

// lifetime reads a number of seconds from now; 0 is now.
func lifetime(name string, n int64) (time.Duration, error) {
	if n < 0 {
		return 0, sandbox.Invalidf("%s %d: want 0 or more seconds", name, n)
	}
	return exchange.Seconds(name, n)
}

// notRunning says of a paused sandbox what the contract says of one: that none of that id is found running.
func notRunning(err error) error {
	if errors.Is(err, sandbox.ErrConflict) {
		return sandbox.NotFoundf("%v", err)
	}
	return err
}

// setTimeout may also shorten a life; 0 ends it.
func (s *server) setTimeout(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Timeout *int64 `json:"timeout"`
	}
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	if body.Timeout == nil {
		return sandbox.Invalidf("timeout is missing: want a number of seconds")
	}
	life, err := lifetime("timeout", *body.Timeout)
	if err != nil {
		return err
	}
	if _, err := s.control.SetTimeout(r.Context(), id, life); err != nil {
		return notRunning(err)
	}
	return exchange.Empty(w)
}

// refresh only ever extends a life.
func (s *server) refresh(w http.ResponseWriter, r *http.Request) error {
	body := struct {
		Duration *int64 `json:"duration"`
	}{}
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	if body.Duration == nil {
		body.Duration = new(int64(defaultRefresh))
	}
	life, err := lifetime("duration", *body.Duration)
	if err != nil {
		return err
	}
	if _, err := s.control.Extend(r.Context(), id, life); err != nil {
		return notRunning(err)
	}
	return exchange.Empty(w)
}
