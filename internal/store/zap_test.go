package store

import (
	"bytes"
	"errors"
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap" //nolint:depguard // what is under test
)

func TestZapLogger(t *testing.T) {
	var out bytes.Buffer
	noTime := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	log := zapLogger(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: noTime})))
	log.Info("not shown")
	log.Warn("Running http and grpc server on single port. This is not recommended for production.")
	log.Error("failed to update storage version", zap.Error(errors.New("cannot detect: missing term information")))
	log.With(zap.String("local-member-id", "abc")).Warn("slow fdatasync", zap.Int("took", 3))
	log.Error("failed to update storage version", zap.Error(errors.New("disk on fire")))
	want := `level=WARN msg=etcd local_member_id=abc detail="slow fdatasync" took=3
level=ERROR msg=etcd detail="failed to update storage version" err="disk on fire"
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}
