package cli

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// progress shows a long piece of work: a bar that redraws itself on a terminal, plain lines elsewhere.
type progress struct {
	w     io.Writer
	width int // 0: no terminal
	step  string
	tenth int
	drawn bool
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, tenth: -1}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil {
			p.width = width
		}
	}
	return p
}

// update shows that step is under way and how much, 0 to 1, of the whole is done.
func (p *progress) update(step string, fraction float64) {
	if step == "" {
		return
	}
	fraction = min(max(fraction, 0), 1)
	if p.width == 0 {
		if tenth := int(fraction * 10); step != p.step || tenth > p.tenth {
			p.step, p.tenth = step, tenth
			_, _ = fmt.Fprintf(p.w, "%3.0f%%  %s\n", fraction*100, step)
		}
		return
	}
	p.step = step
	const bar = 30
	full := int(fraction * bar)
	text := fmt.Sprintf("[%s%s] %3.0f%%  %s", strings.Repeat("#", full), strings.Repeat(".", bar-full), fraction*100, step)
	if r := []rune(text); len(r) >= p.width {
		text = string(r[:max(p.width-1, 0)])
	}
	_, _ = fmt.Fprint(p.w, "\r\x1b[K"+text)
	p.drawn = true
}

// line prints a message above the bar.
func (p *progress) line(message string) {
	p.end()
	_, _ = fmt.Fprintln(p.w, "      "+message)
}

// end leaves the bar's line.
func (p *progress) end() {
	if p.drawn {
		_, _ = fmt.Fprint(p.w, "\r\x1b[K")
		p.drawn = false
	}
}
