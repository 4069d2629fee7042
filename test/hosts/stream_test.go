package hosts_test

import (
	"bufio"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/test/harness"
)

// stream is an answer of a workload that goes on for as long as it is read.
type stream struct {
	name  string
	close func() error
	done  chan struct{}

	mu    sync.Mutex
	lines int
	err   error
}

// streamFrom reads a sandbox's count through a machine's proxy until the test ends or the stream breaks.
func streamFrom(t *testing.T, proxy *harness.Machine, id string) *stream {
	t.Helper()
	h := proxy.HTTP()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:3002/sandbox/"+id+"/"+workloadPort+"/ticks", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := h.Do(req) //nolint:bodyclose // end closes it
	if err != nil {
		t.Fatal(err)
	}
	s := &stream{name: "stream of " + id + " by way of " + proxy.Name, close: resp.Body.Close, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		defer h.CloseIdleConnections()
		lines := bufio.NewScanner(resp.Body)
		for n := 1; lines.Scan(); n++ {
			if got, err := strconv.Atoi(lines.Text()); err != nil || got != n {
				s.note(n, fmt.Errorf("line %d is %q", n, lines.Text()))
				return
			}
			s.note(n, nil)
		}
		s.note(-1, fmt.Errorf("it ended: %w", lines.Err()))
	}()
	t.Cleanup(s.end)
	return s
}

// note takes how far the stream is; -1 leaves that as it was.
func (s *stream) note(lines int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if lines >= 0 {
		s.lines = lines
	}
	s.err = err
}

func (s *stream) read() (lines int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines, s.err
}

// end closes the stream.
func (s *stream) end() {
	_ = s.close() // the reader tells
	<-s.done
}

// check reports a stream that broke or stands still, and ends it.
func (s *stream) check(t *testing.T) {
	t.Helper()
	first, _ := s.read()
	deadline := time.After(10 * time.Second)
	for now, err := first, error(nil); now == first && err == nil; now, err = s.read() {
		select {
		case <-deadline:
			t.Errorf("%s stands still at %d", s.name, now)
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
	lines, err := s.read()
	t.Logf("%s: %d lines", s.name, lines)
	if err != nil {
		t.Errorf("%s: after %d lines: %v", s.name, lines, err)
	}
	s.end()
}
