package guest

import (
	"bytes"
	"io"
	"mime"
	"mime/multipart"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// part is what a reader of forms finds.
type part struct{ Disposition, Content string }

// readForm reads all parts with ours, through a buffer and from a source of the given kinds.
func readForm(body []byte, boundary string, size int, slow bool) ([]part, error) {
	src := io.Reader(bytes.NewReader(body))
	if slow {
		src = iotest.OneByteReader(src)
	}
	f, err := newFormReader(src, boundary, make([]byte, size))
	if err != nil {
		return nil, err
	}
	var parts []part
	for {
		header, err := f.next()
		if err == io.EOF { //nolint:errorlint // The end as such.
			return parts, nil
		}
		if err != nil {
			return parts, err
		}
		var content bytes.Buffer
		if err := f.copyTo(&content); err != nil {
			return parts, err
		}
		parts = append(parts, part{header.Get("Content-Disposition"), content.String()})
	}
}

// readStandard does the same with the standard library's.
func readStandard(body []byte, boundary string) (parts []part, err error) {
	m := multipart.NewReader(bytes.NewReader(body), boundary)
	for {
		p, err := m.NextRawPart()
		if err == io.EOF { //nolint:errorlint // The end as such.
			return parts, nil
		}
		if err != nil {
			return parts, err
		}
		content, err := io.ReadAll(p)
		if err != nil {
			return parts, err
		}
		parts = append(parts, part{p.Header.Get("Content-Disposition"), string(content)})
	}
}

const smallBuffer = maxPartHeader + 2*maxBoundary

func TestFormReader(t *testing.T) {
	long := strings.Repeat("\r\n--boundar\r\r\n-", 5000)
	for name, test := range map[string]struct {
		body string
		want []part
		bad  bool
	}{
		"one":               {"--boundary\r\nContent-Disposition: a\r\n\r\ntext\r\n--boundary--\r\n", []part{{"a", "text"}}, false},
		"preamble":          {"ignored\r\n--boundary\r\nContent-Disposition: a\r\n\r\ntext\r\n--boundary--epilogue", []part{{"a", "text"}}, false},
		"padding":           {"--boundary \t\r\nContent-Disposition: a\r\n\r\ntext\r\n--boundary--", []part{{"a", "text"}}, false},
		"empty content":     {"--boundary\r\nContent-Disposition: a\r\n\r\n\r\n--boundary--", []part{{"a", ""}}, false},
		"no header":         {"--boundary\r\n\r\ntext\r\n--boundary--", []part{{"", "text"}}, false},
		"almost a boundary": {"--boundary\r\n\r\n\r\n--boundaryX\r\n--bound" + long + "\r\n--boundary\r\n\r\n\r\n\r\n--boundary--", []part{{"", "\r\n--boundaryX\r\n--bound" + long}, {"", "\r\n"}}, false},
		"nothing":           {"--boundary--", nil, false},
		"cut in content":    {"--boundary\r\n\r\ntext\r\n--bounda", nil, true},
		"cut in header":     {"--boundary\r\nContent-", nil, true},
		"cut after it":      {"--boundary\r\n\r\ntext\r\n--boundary", nil, true},
		"empty":             {"", nil, true},
		"junk after it":     {"--boundary junk\r\n\r\ntext\r\n--boundary--", nil, true},
		"bad header":        {"--boundary\r\nno colon\r\n\r\ntext\r\n--boundary--", nil, true},
		"endless header":    {"--boundary\r\nA: " + strings.Repeat("x", 2*maxPartHeader) + "\r\n\r\ntext\r\n--boundary--", nil, true},
	} {
		for _, size := range []int{smallBuffer, copyBuffer} {
			for _, slow := range []bool{false, true} {
				got, err := readForm([]byte(test.body), "boundary", size, slow)
				if (err != nil) != test.bad {
					t.Errorf("%s (buffer %d, slow %v): error %v", name, size, slow, err)
				}
				if diff := cmp.Diff(test.want, got); !test.bad && diff != "" {
					t.Errorf("%s (buffer %d, slow %v) (-want +got):\n%s", name, size, slow, diff)
				}
			}
		}
	}
	for _, boundary := range []string{"", strings.Repeat("b", maxBoundary+1)} {
		if _, err := newFormReader(nil, boundary, nil); err == nil {
			t.Errorf("boundary %q was taken", boundary)
		}
	}
}

// Whatever the standard library's writer makes, both readers see the same.
func FuzzFormReader(f *testing.F) {
	f.Add("a", "text", "b", "\r\n--x")
	f.Fuzz(func(t *testing.T, name1, content1, name2, content2 string) {
		var body bytes.Buffer
		m := multipart.NewWriter(&body)
		if m.SetBoundary("x") != nil {
			t.Fatal("boundary")
		}
		for _, p := range [][2]string{{name1, content1}, {name2, content2}} {
			w, err := m.CreateFormFile("file", p[0])
			if err != nil || strings.Contains(p[1], "\n--x") {
				return
			}
			_, _ = io.WriteString(w, p[1])
		}
		_ = m.Close()
		want, err := readStandard(body.Bytes(), "x")
		if err != nil {
			return
		}
		for _, size := range []int{smallBuffer, copyBuffer} {
			got, err := readForm(body.Bytes(), "x", size, false)
			if err != nil || cmp.Diff(want, got) != "" {
				t.Errorf("%v\n%s", err, cmp.Diff(want, got))
			}
		}
	})
}

// Any bytes are read to their end or refused, the same through every buffer.
func FuzzFormBytes(f *testing.F) {
	f.Add([]byte("--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\ntext\r\n--b--\r\n"))
	f.Add([]byte("--b \r\n\r\n\r\n--bb\r\n--b--"))
	f.Fuzz(func(t *testing.T, body []byte) {
		large, err1 := readForm(body, "b", copyBuffer, false)
		small, err2 := readForm(body, "b", smallBuffer, true)
		if (err1 == nil) != (err2 == nil) || cmp.Diff(large, small) != "" {
			t.Errorf("%v, %v\n%s", err1, err2, cmp.Diff(large, small))
		}
	})
}

func FuzzDisposition(f *testing.F) {
	f.Add(`form-data; name="file"; filename="/a/b%22.txt"`)
	f.Fuzz(func(t *testing.T, header string) {
		name, filename := disposition(header)
		if kind, _, err := mime.ParseMediaType(header); (name != "" || filename != "") && (err != nil || kind != "form-data") {
			t.Errorf("%q has name %q, file name %q", header, name, filename)
		}
	})
}
