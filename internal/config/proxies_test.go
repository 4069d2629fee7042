package config_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/config"
)

func TestProxyAddresses(t *testing.T) {
	c := config.Default()
	c.Proxies = []string{"https://Edge-1:3005", "edge-2", "https://192.0.2.9:4000/", "[2001:db8::1]:3005"}
	got, err := c.ProxyAddresses()
	if diff := cmp.Diff([]string{"edge-1:3005", "edge-2:3005", "192.0.2.9:4000", "[2001:db8::1]:3005"}, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	for _, bad := range [][]string{
		{"http://edge-1:3005"},
		{"https://edge-1:3005/traffic"},
		{"https://me@edge-1"},
		{"https://me:secret@edge-1:3005"},
		{"https://edge-1?x=1"},
		{"https://edge-1#x"},
		{"https://"},
		{":3005"},
		{"edge-1:0"},
		{"edge-1:"},
		{"edge-1:70000"},
		{"edge 1"},
		{"edge-1", "https://EDGE-1:3005/"},
	} {
		c.Proxies = bad
		if got, err := c.ProxyAddresses(); err == nil || !strings.Contains(err.Error(), "proxies: ") || !strings.Contains(err.Error(), bad[0]) {
			t.Errorf("%q: %q, %v", bad, got, err)
		}
	}
}

// FuzzProxyAddress checks that whatever is taken can be dialed.
func FuzzProxyAddress(f *testing.F) {
	for _, s := range []string{"https://edge-1:3005", "edge", "[::1]:3", "https://a@b", "x:y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c := config.Default()
		c.Proxies = []string{text}
		got, err := c.ProxyAddresses()
		if err == nil && (len(got) != 1 || strings.ContainsAny(got[0], "/ @")) {
			t.Errorf("%q gave %q", text, got)
		}
	})
}
