package sandbox

import (
	"strings"
	"testing"
)

func TestOriginTakes(t *testing.T) {
	node := func(arch, version string, features ...string) *Origin {
		n := Node{Architecture: arch, Engines: []string{"gvisor"}, EngineVersions: map[string]string{"gvisor": version}, CPUFeatures: features}
		return n.Origin()
	}
	made := node("amd64", "v2", "sse2", "avx")
	for _, tt := range []struct {
		name string
		at   *Origin
		want string // part of the refusal, or "" where it takes it
	}{
		{"the same", node("amd64", "v2", "avx", "sse2"), ""},
		{"more", node("amd64", "v2", "avx", "avx2", "sse2", "xsave"), ""},
		{"itself", made, ""},
		{"unknown", nil, ""},
		{"says nothing", node("", ""), ""},
		{"another architecture", node("arm64", "v2"), "is of the architecture arm64, the checkpoint was made on amd64"},
		{"another version", node("amd64", "v1", "avx", "sse2"), "its gvisor is v1, the checkpoint was made by v2"},
		{"less", node("amd64", "v2", "sse2"), "lacks avx,"},
		{"the last is missing", node("amd64", "v2", "avx"), "lacks sse2,"},
		{"others", node("amd64", "v2", "abc", "xyz"), "lacks avx,"},
	} {
		got := tt.at.Refusal(made)
		if tt.at.Takes(made) != (tt.want == "") || !strings.Contains(got, tt.want) || (got == "") != (tt.want == "") {
			t.Errorf("%s: %v, %q", tt.name, tt.at.Takes(made), got)
		}
	}
	if !made.Takes(nil) {
		t.Error("what nothing is known of is refused")
	}
}
