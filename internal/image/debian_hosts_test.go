//go:build hosts

package image

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestRealBootstrap makes the base image from Debian's archive, which takes a minute, and again from the cached tree.
func TestRealBootstrap(t *testing.T) {
	requireHosts(t)
	s := newStore(t, nil)
	req := Request{Sources: []string{"debian:bookworm"}}
	img, err := s.Build(t.Context(), req, func(p Progress) {
		if p.Message != "" {
			t.Logf("%5.1f%% %s: %s", p.Fraction*100, p.Step, p.Message)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	have := "\n" + strings.Join(paths(t, s, img.Digest), "\n") + "\n"
	for _, want := range []string{
		GuestPath, "/usr/bin/python3", "/usr/bin/python", "/usr/bin/pip", "/usr/bin/git", "/usr/bin/curl", "/usr/bin/sudo",
		"/usr/bin/bash", "/etc/sudoers.d/user", "/home/user/.bashrc", "/usr/bin/ip", "/usr/bin/ps",
	} {
		if !strings.Contains(have, "\n"+want+"\n") && !strings.Contains(have, "\n"+strings.TrimPrefix(want, "/usr")+"\n") {
			t.Errorf("%s is missing", want)
		}
	}
	again, err := s.Build(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(img, again); diff != "" {
		t.Errorf("the cached tree makes another image (-first +second):\n%s", diff)
	}
	t.Logf("%s, %d MiB", img.Digest, img.Bytes>>20)
	assertNoLeftovers(t, s)
}
