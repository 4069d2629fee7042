package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestRefused(t *testing.T) {
	news := 0
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, identityDir), 0o700); err != nil {
		t.Fatal(err)
	}
	open := func() *refused {
		r := openRefused(dir, slog.New(slog.DiscardHandler))
		r.onNews = func() { news++ }
		return r
	}
	r := open()
	gone, back := sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}, sandbox.Member{Role: sandbox.RoleProxy, ID: "bbbbbb"}
	r.take(&nodev1.ReportResponse{RefusalsVersion: "1", Refusals: []*nodev1.Refusal{
		{Member: gone.String()}, {Member: back.String(), Serial: "old"}, {Member: "no member"},
	}})
	r.take(&nodev1.ReportResponse{}) // nothing new
	r = open()                       // started again, with no server to ask
	for _, tc := range []struct {
		m      sandbox.Member
		serial string
		want   bool
	}{{gone, "any", true}, {back, "old", true}, {back, "new", false}, {sandbox.Member{}, "", false}} {
		if got := r.denied(tc.m, tc.serial); got != tc.want {
			t.Errorf("%s with certificate %q: refused %t; want %t", tc.m, tc.serial, got, tc.want)
		}
	}
	if r.gone(back) || !r.gone(gone) || r.known() != "1" || news != 1 {
		t.Errorf("gone: %t, %t; version %q, %d times news", r.gone(back), r.gone(gone), r.known(), news)
	}
	r.take(&nodev1.ReportResponse{RefusalsVersion: "2"})
	if r.denied(gone, "any") {
		t.Error("refused although the server says otherwise")
	}
	if again := open(); again.denied(gone, "any") || again.known() != "2" {
		t.Errorf("started once more: version %q, refused %t", again.known(), again.denied(gone, "any"))
	}
}

// TestRefusedIsKeptLater has the file not be written at first, and then not be readable.
func TestRefusedIsKeptLater(t *testing.T) {
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	gone := sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}
	r := openRefused(dir, log) // there is no directory to write in
	r.take(&nodev1.ReportResponse{RefusalsVersion: "1", Refusals: []*nodev1.Refusal{{Member: gone.String()}}})
	if !r.denied(gone, "any") {
		t.Error("let in because the disk is full")
	}
	if err := os.Mkdir(filepath.Join(dir, identityDir), 0o700); err != nil {
		t.Fatal(err)
	}
	r.take(&nodev1.ReportResponse{})
	if got := openRefused(dir, log); !got.denied(gone, "any") || got.known() != "1" {
		t.Errorf("after there was room: version %q", got.known())
	}
	if err := os.WriteFile(r.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := openRefused(dir, log).known(); got != "" {
		t.Errorf("a file that cannot be read: version %q; want none, so that the server tells all", got)
	}
}
