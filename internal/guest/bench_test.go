package guest

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
)

func BenchmarkInit(b *testing.B) {
	s := New(Config{Root: b.TempDir()})
	body := `{"accessToken":"t","envVars":{"A":"1"},"hostname":"box","resolvers":["10.0.0.1"],"sandboxId":"sbx1","templateId":"tpl"}`
	for b.Loop() {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequestWithContext(b.Context(), http.MethodPost, "/init", strings.NewReader(body)))
		if w.Code != http.StatusNoContent {
			b.Fatal(w.Code, w.Body)
		}
	}
}

func BenchmarkRun(b *testing.B) {
	for _, codec := range []string{"binary", "JSON"} {
		b.Run(codec, func(b *testing.B) {
			proc := benchAgent(b, codec)
			for b.Loop() {
				stream, err := proc.Start(b.Context(), &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/true"}})
				if err != nil {
					b.Fatal(err)
				}
				for stream.Receive() {
				}
				_ = stream.Close()
			}
		})
	}
}

func BenchmarkOutput(b *testing.B) {
	for _, codec := range []string{"binary", "JSON"} {
		b.Run(codec, func(b *testing.B) {
			proc := benchAgent(b, codec)
			const size = 64 << 20
			b.SetBytes(size)
			for b.Loop() {
				stream, err := proc.Start(b.Context(), &process.StartRequest{Process: &process.ProcessConfig{Cmd: "head", Args: []string{"-c", strconv.Itoa(size), "/dev/zero"}}})
				if err != nil {
					b.Fatal(err)
				}
				n := 0
				for stream.Receive() {
					n += len(stream.Msg().GetEvent().GetData().GetStdout())
				}
				_ = stream.Close()
				if n != size {
					b.Fatal(n)
				}
			}
		})
	}
}

// benchAgent serves for a benchmark.
func benchAgent(b *testing.B, codec string) processconnect.ProcessClient {
	b.Helper()
	root := b.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		b.Fatal(err)
	}
	passwd := fmt.Sprintf("user:x:%d:%d::/:/bin/bash\n", os.Getuid(), os.Getgid())
	if err := os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(passwd), 0o644); err != nil {
		b.Fatal(err)
	}
	s := New(Config{Root: root})
	ctx, cancel := context.WithCancel(context.Background())
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		s.reaper.run(ctx)
	}()
	srv := httptest.NewServer(s)
	b.Cleanup(func() {
		srv.Close()
		cancel()
		<-reaped
		s.rest.stop()
	})
	var options []connect.ClientOption
	if codec == "JSON" {
		options = append(options, connect.WithProtoJSON())
	}
	return processconnect.NewProcessClient(srv.Client(), srv.URL, options...)
}
