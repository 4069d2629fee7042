package telemetry

import (
	"bytes"
	"errors"
	"log/slog"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTextForTerminals(t *testing.T) {
	const key = "e2b_0123456789abcdef0123456789abcdef01234567"
	var out bytes.Buffer
	log := slog.New(newTextHandler(&out, slog.LevelInfo))
	log.Debug("not shown")
	log.Info("started")
	log.With(slog.String("node_id", "abc")).WithGroup("in").Warn("slow "+key, slog.Int("n", 1), slog.String("token", "hush"))
	log.Error("two\nlines", slog.Any("err", errors.New("bad "+key)), slog.String("msg", "an attribute"))
	got := regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d\.\d\d\d `).ReplaceAllString(out.String(), "")
	want := `INF started
WRN slow [redacted] node_id=abc in.n=1 in.token=[redacted]
ERR "two\nlines" err="bad [redacted]" msg="an attribute"
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func BenchmarkText(b *testing.B) {
	log := slog.New(newTextHandler(&bytes.Buffer{}, slog.LevelError))
	for b.Loop() {
		log.Info("not shown", slog.String("sandbox_id", "iabc"))
	}
}
