package link

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// FuzzHead reads heads: what is taken is written again as the same bytes, and what is refused has a kind.
func FuzzHead(f *testing.F) {
	for _, h := range []Head{
		{Kind: RPC},
		{Kind: Artifact, Node: "nodeaa"},
		GuestHead("nodeaa", "ibox", 49983),
		{Kind: Guest, Node: "nodeaa", Sandbox: sandbox.ID(strings.Repeat("a", 64)), Port: 65535, From: sandbox.Member{Role: sandbox.RoleProxy, ID: "proxyp"}},
	} {
		text, err := h.append(nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte{0})
	f.Add([]byte{3, 2, 1, 0})
	f.Add([]byte{9, 1, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, text []byte) {
		r := bytes.NewReader(text)
		h, err := readHead(r)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%x: %v; want ErrInvalid", text, err)
			}
			return
		}
		again, err := h.append(nil)
		if err != nil {
			t.Fatalf("%+v was read and cannot be written: %v", h, err)
		}
		if read := text[:len(text)-r.Len()]; !bytes.Equal(again, read) {
			t.Errorf("%x became %+v, which is %x", read, h, again)
		}
	})
}

// FuzzAnswer reads answers, which must never take more than they may.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte{0, 1, 2})
	f.Add(answer(sandbox.NotFoundf("no sandbox x")))
	f.Add(answer(errors.New(strings.Repeat("x", 5000))))
	f.Add([]byte{1, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, text []byte) {
		err := readAnswer(bytes.NewReader(text))
		var remote *RemoteError
		if !errors.As(err, &remote) {
			return
		}
		again := answer(remote)
		if err := readAnswer(bytes.NewReader(again)); err == nil || err.Error() != remote.Error() {
			t.Errorf("%q became %v", remote.Error(), err)
		}
	})
}

func TestHeadRoundTrip(t *testing.T) {
	want := GuestHead("nodeaa", "ibox", 80)
	want.From = sandbox.Member{Role: sandbox.RoleNode, ID: "nodebb"}
	text, err := want.append([]byte("before"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := readHead(bytes.NewReader(append(text[len("before"):], "after"...)))
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v, (-want +got):\n%s", err, diff)
	}
}

func TestHeadsThatAreNone(t *testing.T) {
	for _, h := range []Head{
		{},
		{Kind: 4},
		{Kind: RPC, Port: 1},
		{Kind: Artifact, Sandbox: "ibox"},
		{Kind: Guest, Port: 1},
		{Kind: Guest, Sandbox: "ibox"},
		{Kind: Guest, Sandbox: "I/box", Port: 1},
		{Kind: RPC, Node: "nope"},
		{Kind: RPC, From: sandbox.Member{Role: "king", ID: "abcdef"}},
		{Kind: RPC, From: sandbox.Member{Role: sandbox.RoleNode}},
	} {
		if _, err := h.append(nil); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v; want ErrInvalid", h, err)
		}
	}
}
