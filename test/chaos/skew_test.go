package chaos

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const childWord = "tell-the-time"

// TestMain lets the test's program be the child whose clock is stepped.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == childWord {
		tellTime()
		return
	}
	m.Run() // its result is the program's
}

// tellTime answers each line with the time, while others ask for it all the time. It says too whether the monotonic clock has
// ever gone back.
func tellTime() {
	for range 4 {
		go func() {
			for born, last := time.Now(), time.Duration(0); ; {
				now := time.Since(born)
				if now < last {
					panic("the monotonic clock goes back")
				}
				last = now
			}
		}()
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		fmt.Println(time.Now().UnixMilli()) //nolint:forbidigo // it is what the program is for
	}
}

func TestSkew(t *testing.T) {
	if !canSkew {
		t.Log("no code for this processor")
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], childWord)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(out)
	ahead := func() time.Duration {
		t.Helper()
		if _, err := in.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
		line, err := answers.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		ms, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Until(time.UnixMilli(ms)).Round(time.Minute)
	}
	pid := cmd.Process.Pid
	for _, by := range []time.Duration{0, time.Hour, -2 * time.Hour, 0} {
		if err := skew(pid, by); err != nil {
			t.Fatal(err)
		}
		if got := ahead(); got != by {
			t.Errorf("its clock is apart by %s, want %s", got, by)
		}
	}
	if stood, err := stands(pid); stood || err != nil {
		t.Errorf("afterwards it stands still: %t, %v", stood, err)
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// A process that stands still goes on standing still, with its first step as with the next.
func TestSkewOfStopped(t *testing.T) {
	if !canSkew {
		t.Log("no code for this processor")
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], childWord)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for {
		if stood, err := stands(pid); err != nil {
			t.Fatal(err)
		} else if stood {
			break
		}
	}
	for range 2 {
		if err := skew(pid, time.Minute); err != nil {
			t.Fatal(err)
		}
		if stood, err := stands(pid); !stood || err != nil {
			t.Errorf("it stands still: %t, %v", stood, err)
		}
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Error(err)
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
