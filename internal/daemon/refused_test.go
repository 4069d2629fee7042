package daemon

import (
	"testing"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestRefused(t *testing.T) {
	news := 0
	r := &refused{onNews: func() { news++ }}
	gone, back := sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}, sandbox.Member{Role: sandbox.RoleProxy, ID: "bbbbbb"}
	r.take(&nodev1.ReportResponse{RefusalsVersion: "1", Refusals: []*nodev1.Refusal{
		{Member: gone.String()}, {Member: back.String(), Serial: "old"}, {Member: "no member"},
	}})
	r.take(&nodev1.ReportResponse{}) // nothing new
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
}
