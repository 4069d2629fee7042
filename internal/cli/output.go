package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/cloister-dev/cloister/internal/config"
)

// print writes v as JSON where the user asked for it, else calls table.
func (a *app) print(v any, table func(w io.Writer)) error {
	if a.output == "json" {
		if r := reflect.ValueOf(v); r.Kind() == reflect.Slice && r.IsNil() {
			v = []struct{}{} // an empty list is [], never null
		}
		enc := json.NewEncoder(a.out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(a.out, 0, 4, 2, ' ', 0)
	table(w)
	return w.Flush()
}

// row writes one line of a table.
func row(w io.Writer, cells ...string) {
	for i, c := range cells {
		cells[i] = printable(c)
	}
	_, _ = fmt.Fprintln(w, strings.Join(cells, "\t")) // a failing writer shows at Flush
}

// printable replaces what would break a table or speak to the terminal: names and messages come from users and sandboxes.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// size writes bytes as people read them: 512MiB, 1.5GiB.
func size(bytes int64) string {
	const unit = 1024
	if bytes < unit {
		return fmt.Sprintf("%dB", bytes)
	}
	value, suffix := float64(bytes), ""
	for _, suffix = range []string{"KiB", "MiB", "GiB", "TiB"} {
		if value /= unit; value < unit {
			break
		}
	}
	text := fmt.Sprintf("%.1f", value)
	return strings.TrimSuffix(text, ".0") + suffix
}

// sizeOrDash is size with "-" for nothing.
func sizeOrDash(bytes int64) string {
	if bytes == 0 {
		return "-"
	}
	return size(bytes)
}

// cpus writes millicores as a number of processors.
func cpus(milli int64) string {
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.3f", float64(milli)/1000), "0"), ".")
}

// ago writes how long ago t was, or "-" for no time.
func ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(time.Since(t)) + " ago"
}

// in writes how far away t is, or "never" for no time.
func in(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	if left := time.Until(t); left > 0 {
		return "in " + span(left)
	}
	return "now"
}

// span rounds a duration to its two leading units.
func span(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

// pairs writes a map as sorted k=v, or "-".
func pairs(m map[string]string) string {
	if len(m) == 0 {
		return "-"
	}
	out := make([]string, 0, len(m))
	for _, k := range sortedKeys(m) {
		out = append(out, k+"="+m[k])
	}
	return strings.Join(out, ",")
}

// parsePairs reads KEY=VALUE arguments.
func parsePairs(what string, args []string) (map[string]string, error) {
	out := make(map[string]string, len(args))
	for _, arg := range args {
		k, v, ok := strings.Cut(arg, "=")
		if !ok || k == "" {
			return nil, &usageError{fmt.Errorf("%s %q: want KEY=VALUE", what, arg)}
		}
		out[k] = v
	}
	return out, nil
}

// parseSize reads a size argument in bytes; nothing is 0.
func parseSize(what, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := config.ParseSize(text)
	if err != nil {
		return 0, &usageError{fmt.Errorf("%s: %w", what, err)}
	}
	return int64(n), nil
}
