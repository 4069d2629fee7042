package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	toolPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// tailBytes of a program's output are kept to explain a failure.
	tailBytes = 2 << 10
)

// bootstrapArgs is one run of debootstrap.
type bootstrapArgs struct {
	suite, arch, target string
	mirror              mirror
}

func (s *Store) debootstrapPath() (string, error) {
	for _, name := range []string{s.tools.debootstrap, "/usr/sbin/debootstrap"} {
		if found, err := exec.LookPath(name); err == nil {
			return found, nil
		}
	}
	return "", sandbox.Unavailablef("debootstrap is not installed; apt-get install debootstrap debian-archive-keyring")
}

// keyring returns the keys that a mirror's suite must be signed with.
func (s *Store) keyring(m mirror) (string, error) {
	names := []string{
		m.keyring, filepath.Join(s.tools.keyringDir, "debian-archive-keyring.gpg"),
		filepath.Join(s.tools.keyringDir, "debian-archive-keyring.pgp"),
	}
	for _, name := range names {
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			return name, nil
		}
	}
	return "", sandbox.Unavailablef("the keys of Debian are not on this machine (%s); apt-get install debian-archive-keyring", names[1])
}

// debootstrap fills the target directory. The child has its own mount and process namespaces and dies with this process,
// so that whatever ends it takes its mounts and children along.
func (b *build) debootstrap(ctx context.Context, args bootstrapArgs) error {
	program, err := b.store.debootstrapPath()
	if err != nil {
		return err
	}
	keyring, err := b.store.keyring(args.mirror)
	if err != nil {
		return err
	}
	if err := os.Mkdir(args.target, 0o755); err != nil { //nolint:gosec // the root directory of an image; what is above it is closed
		return err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, //nolint:gosec // fixed options, a checked suite and the machine's own mirror
		"--debian-installer", "--variant=minbase", "--components=main",
		"--arch="+args.arch, "--include="+debianPackages, "--cache-dir="+b.store.debDir(), "--force-check-gpg",
		"--keyring="+keyring, args.suite, args.target, args.mirror.url)
	cmd.Env = append(cmd.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "PATH="+toolPath)
	output := &tail{limit: tailBytes}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = output, output, []*os.File{write}
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
	}
	parser := &bootstrapParser{report: b.report}
	b.report(Progress{Step: "bootstrap", Message: "bootstrapping " + args.suite + " from " + args.mirror.url})
	err = runChild(cmd, write, func() { parser.read(read) })
	err = errors.Join(err, read.Close())
	if err == nil || ctx.Err() != nil {
		return err
	}
	return sandbox.Unavailablef("debootstrap: %v%s%s", err, parser.failure, b.explain(args.target, output))
}

// runChild runs a child and, beside it, what reads from its pipe, whose write end it closes here.
func runChild(cmd *exec.Cmd, write *os.File, reading func()) error {
	result := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		// The parent-death signal is tied to the thread that starts the child: it must not end before the child does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		err = errors.Join(err, write.Close())
		close(done)
		if err == nil {
			err = cmd.Wait()
		}
		result <- err
	}()
	<-done
	reading()
	return <-result
}

// explain returns the end of what debootstrap and the package manager said.
func (b *build) explain(target string, output *tail) string {
	said := strings.TrimSpace(output.String())
	if logged := readText(filepath.Join(target, "debootstrap", "debootstrap.log")); logged != "" {
		said += "\n" + strings.TrimSpace(logged[max(0, len(logged)-tailBytes):])
	}
	if said = strings.TrimSpace(said); said == "" {
		return ""
	}
	return "; it said last:\n" + said
}

// tail keeps the end of what is written to it.
type tail struct {
	limit int
	data  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.data = append(t.data, p...)
	if over := len(t.data) - t.limit; over > 0 {
		t.data = append(t.data[:0], t.data[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.data) }

// phase is a part of a bootstrap: its name in debootstrap's protocol, where in the whole it ends, and how its numbers
// read. The shares are measured.
type phase struct {
	name   string
	from   float64
	to     float64
	text   string
	divide int64
}

func phases() []phase {
	const mebi = 1 << 20
	return []phase{
		{"DOWNREL", 0, 0.01, "fetching the release file", 0},
		{"DOWNRELSIG", 0.01, 0.02, "checking its signature", 0},
		{"DOWNPKGS", 0.02, 0.12, "fetching the package lists", 0},
		{"DOWNMAINPKGS", 0.02, 0.12, "fetching the package lists", 0},
		{"SIZEDEBS", 0.12, 0.14, "choosing packages: %d of %d", 1},
		{"DOWNDEBS", 0.14, 0.40, "downloading packages: %d of %d MiB", mebi},
		{"EXTRACTPKGS", 0.40, 0.46, "extracting essential packages: %d of %d", 1},
		{"INSTCORE", 0.46, 0.55, "installing the package manager", 0},
		{"UNPACKREQ", 0.55, 0.72, "unpacking essential packages: %d of %d", 1},
		{"CONFREQ", 0.72, 0.82, "configuring essential packages: %d of %d", 1},
		{"UNPACKBASE", 0.82, 0.91, "unpacking packages: %d of %d", 1},
		{"CONFBASE", 0.91, 1, "configuring packages: %d of %d", 1},
	}
}

// bootstrapParser reads what debootstrap --debian-installer writes to descriptor 3: lines of "P: now end PHASE" for
// progress, and of "E: NAME", "EA: argument", "EF: format" for an error (W and I are warnings and information).
type bootstrapParser struct {
	report func(Progress)
	// failure is what the last error said.
	failure string

	current phase
	said    int64 // tenths of the phase for which there was a message
	args    []string
}

const maxProtocolLine = 64 << 10

func (p *bootstrapParser) read(r io.Reader) {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 4<<10), maxProtocolLine)
	for in.Scan() {
		p.line(in.Text())
	}
	_, _ = io.Copy(io.Discard, r) // a line too long must not block the child
}

func (p *bootstrapParser) line(line string) {
	kind, rest, ok := strings.Cut(line, ":")
	if !ok || len(kind) == 0 || len(kind) > 2 {
		return
	}
	rest = strings.TrimPrefix(rest, " ")
	switch {
	case kind == "P":
		p.progress(strings.Fields(rest))
	case len(kind) == 1:
		p.args = nil
	case kind[1] == 'A':
		const most = 16
		if len(p.args) < most {
			p.args = append(p.args, rest)
		}
	case kind == "EF":
		p.failure = "; " + fill(rest, p.args)
	case kind == "WF":
		p.report(Progress{Step: "bootstrap", Fraction: p.current.from * bootstrapShare, Message: fill(rest, p.args)})
	}
}

// fill puts arguments into a format of printf(1) that has nothing but %s.
func fill(format string, args []string) string {
	for _, arg := range args {
		format = strings.Replace(format, "%s", arg, 1)
	}
	return format
}

func (p *bootstrapParser) progress(words []string) {
	if len(words) < 2 {
		return
	}
	now, nowErr := strconv.ParseInt(words[0], 10, 64)
	end, endErr := strconv.ParseInt(words[1], 10, 64)
	if nowErr != nil || endErr != nil || end <= 0 {
		return
	}
	now = min(max(0, now), end)
	message := ""
	if len(words) > 2 && words[2] != p.current.name {
		for _, ph := range phases() {
			if ph.name == words[2] {
				p.current, p.said = ph, -1
			}
		}
	}
	const tenths = 10
	if tenth := int64(float64(now) / float64(end) * tenths); tenth > p.said && p.current.name != "" {
		if p.said < 0 || p.current.divide > 0 {
			message = p.current.message(now, end)
		}
		p.said = tenth
	}
	done := p.current.from + (p.current.to-p.current.from)*float64(now)/float64(end)
	p.report(Progress{Step: "bootstrap", Fraction: done * bootstrapShare, Message: message})
}

func (ph phase) message(now, end int64) string {
	if ph.divide == 0 {
		return ph.text
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, ph.text, now/ph.divide, end/ph.divide)
	return b.String()
}
