package image

import (
	"bytes"
	"io"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// mapMembers are members held in memory.
type mapMembers map[string][]byte

func (m mapMembers) open(name string) (io.ReadCloser, int64, error) {
	data, ok := m[name]
	if !ok {
		return nil, 0, sandbox.NotFoundf("%q is missing", name)
	}
	return io.NopCloser(bytes.NewReader(data)), int64(len(data)), nil
}

func FuzzDockerArchive(f *testing.F) {
	f.Add([]byte(`[{"Config":"c","RepoTags":["a:1"],"Layers":["l"]}]`), []byte(`{"rootfs":{"diff_ids":["sha256:`+hex64()+`"]}}`))
	f.Add([]byte(`[{},{}]`), []byte(`null`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		c, err := readDockerArchive(mapMembers{"manifest.json": manifest, "c": config, "l": nil})
		if err != nil {
			return
		}
		if c.check() == nil && len(c.layers) != len(c.config.RootFS.DiffIDs) {
			t.Error("layers without digests were accepted")
		}
	})
}

func FuzzLayout(f *testing.F) {
	manifest := []byte(`{"config":{"digest":"sha256:` + hex64() + `"},"layers":[{"digest":"sha256:` + hex64() + `"}]}`)
	f.Add([]byte(`{"manifests":[{"digest":"`+digestOf(manifest)+`","mediaType":"application/vnd.oci.image.manifest.v1+json"}]}`), manifest)
	loop := []byte(`{"manifests":[{"digest":"sha256:` + hex64() + `","mediaType":"application/vnd.oci.image.index.v1+json"}]}`)
	f.Add(loop, loop)
	f.Fuzz(func(_ *testing.T, index, blob []byte) {
		m := mapMembers{"index.json": index, "blobs/sha256/" + hex64(): blob}
		m["blobs/sha256/"+digestOf(blob)[len("sha256:"):]] = blob
		_, _, _ = readLayout(m)
	})
}

func FuzzTarIndex(f *testing.F) {
	f.Add(tarOf(f, "manifest.json", "[]", "a/", "", "a/b", "x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := indexTar(t.Context(), bytes.NewReader(data))
		if err != nil {
			return
		}
		for name := range m.parts {
			r, size, err := m.open(name)
			if err != nil {
				continue
			}
			if n, err := io.Copy(io.Discard, r); err != nil || n > size {
				t.Errorf("%q: read %d of %d bytes, %v", name, n, size, err)
			}
		}
	})
}

func FuzzBootstrapProtocol(f *testing.F) {
	f.Add("P: 0 100 DOWNREL\nPF: Downloading\nP: 50 100\nI: X\nIA: a\nIF: Retrieving %s %s\nE: BAD\nEA: %s\nEF: no %s\n")
	f.Add("P: 9223372036854775807 1 DOWNDEBS\nP: -1 -1\nP:\nWF: %s%s%s\nEA\n: \n")
	f.Fuzz(func(t *testing.T, text string) {
		p := &bootstrapParser{report: func(p Progress) {
			if !(p.Fraction >= 0 && p.Fraction <= bootstrapShare) {
				t.Errorf("fraction %f", p.Fraction)
			}
		}}
		p.read(bytes.NewReader([]byte(text)))
	})
}

func FuzzDecompress(f *testing.F) {
	f.Add([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff, 1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 4, 0, 1, 0, 0, 0x99, 0xe9, 0xd8, 0x51})
	f.Add([]byte("plain"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, done, err := decompress(bytes.NewReader(data))
		if err != nil {
			return
		}
		defer done()
		const limit = 1 << 20
		if n, _ := io.Copy(io.Discard, &capReader{r: r, left: limit}); n > limit {
			t.Errorf("%d bytes got through a limit of %d", n, limit)
		}
	})
}
