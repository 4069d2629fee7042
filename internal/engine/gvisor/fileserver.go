package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/flipcall"
	"gvisor.dev/gvisor/pkg/sentry/state/stateipc"
)

// The bounds of what a sentry may ask of a file server.
const (
	maxMessage   = 1 << 20 // bytes of one call
	maxCallFiles = 4       // open files that come with one call
	maxClients   = 256     // files that the sentry hands over, per served file
	maxClientMap = 1 << 46 // bytes of one such file

	// What the server offers. A transfer is some consecutive bytes of a served file, and up to so many ranges of a client's.
	maxTransfer  = 16 << 20
	maxRanges    = 256
	maxTransfers = 16
)

// fileServer serves the files of one checkpoint to one sentry, over the protocol of gVisor's package stateipc. gVisor's own
// server would do, but trusts its client: this one takes everything that comes from the sentry for hostile. It runs in a
// process of its own, which serves one checkpoint and ends. Where it can, it has the file system share what it would
// otherwise copy.
type fileServer struct {
	sock  int
	write bool
	// files are those that may be opened, each once. Nil means that what is written is dropped.
	files   map[string]*os.File
	windows flipcall.PacketWindowAllocator

	served []*servedFile // by handle
	wg     sync.WaitGroup
	// kept is what a file that comes through a pipe may need; out is for those that go through one. Gone is closed when the
	// sentry has hung up.
	kept *os.File
	out  outflow
	gone chan struct{}

	shared atomic.Int64 // bytes that were cloned
	errno  atomic.Int64 // the first error of a transfer
}

// servedFile is a file that the sentry has opened.
type servedFile struct {
	server *fileServer
	file   *os.File // nil drops what is written
	ep     flipcall.Endpoint
	done   chan struct{} // closed when ep is not used any more
	offset int64         // of the next byte that is written
	piped  bool          // file is a pipe
	in     incoming      // where it is, and is read

	mu      sync.Mutex
	clients []*clientFile // by handle
}

// clientFile is a file of the sentry's memory or disk.
type clientFile struct {
	file    *os.File
	size    uint64
	mapping []byte // nil until needed
	clone   bool   // the file systems have not refused to share yet
}

// serve answers calls until the sentry hangs up, and frees everything.
func (s *fileServer) serve() error {
	if err := s.windows.Init(); err != nil {
		return fmt.Errorf("make packet windows: %w", err)
	}
	defer s.windows.Destroy()
	s.kept = s.files[keptFile]
	delete(s.files, keptFile)
	s.gone, s.out.whole = make(chan struct{}), make(chan struct{})
	for _, f := range s.files {
		if !isPipe(f) {
			s.out.open++
		}
	}
	err := s.answerAll()
	close(s.gone)
	for _, f := range s.served {
		if f != nil {
			f.ep.Shutdown()
		}
	}
	s.wg.Wait()
	for _, f := range s.served {
		if f != nil {
			f.close()
		}
	}
	return err
}

func (s *fileServer) answerAll() error {
	r := &callReader{sock: s.sock}
	for {
		raw, fds, err := r.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		result, passed, err := s.handle(raw, fds)
		for _, fd := range fds {
			_ = unix.Close(fd) // duplicated where it is needed
		}
		if err := reply(s.sock, result, passed, err); err != nil {
			return err
		}
	}
}

// handle carries out one call. It returns the result and the file that goes with it, or -1.
func (s *fileServer) handle(raw []byte, fds []int) (result any, passed int, err error) {
	var call struct {
		Method string          `json:"method"`
		Arg    json.RawMessage `json:"arg"`
	}
	if err := json.Unmarshal(raw, &call); err != nil {
		return nil, -1, err
	}
	switch call.Method {
	case "AsyncFileServer.Open":
		var req stateipc.OpenRequest
		if err := json.Unmarshal(call.Arg, &req); err != nil {
			return nil, -1, err
		}
		return s.open(req)
	case "AsyncFileServer.RegisterClientFile":
		var req stateipc.RegisterClientFileRequest
		if err := json.Unmarshal(call.Arg, &req); err != nil {
			return nil, -1, err
		}
		handle, err := s.register(&req, fds)
		return &stateipc.RegisterClientFileResponse{Handle: handle}, -1, err
	case "AsyncFileServer.Close":
		var req stateipc.CloseRequest
		if err := json.Unmarshal(call.Arg, &req); err != nil {
			return nil, -1, err
		}
		return &stateipc.CloseResponse{}, -1, s.closeHandle(req.Handle)
	}
	return nil, -1, fmt.Errorf("no method %.40q", call.Method)
}

// open begins to serve a file.
func (s *fileServer) open(req stateipc.OpenRequest) (*stateipc.OpenResponse, int, error) {
	mode := stateipc.OpenModeRead
	if s.write {
		mode = stateipc.OpenModeWrite
	}
	file, ok := s.files[req.Path]
	if !ok || req.Mode != mode {
		return nil, -1, fmt.Errorf("file %.40q is not to be opened in mode %d", req.Path, req.Mode)
	}
	window, err := s.windows.Allocate(flipcall.PacketWindowLengthForDataCap(windowBytes))
	if err != nil {
		return nil, -1, err
	}
	f := &servedFile{server: s, file: file, done: make(chan struct{}), piped: isPipe(file), in: incoming{pipe: file, kept: s.kept}}
	if err := f.ep.Init(flipcall.ServerSide, window); err != nil {
		return nil, -1, err
	}
	delete(s.files, req.Path)
	s.served = append(s.served, f)
	s.wg.Go(f.run)
	return &stateipc.OpenResponse{
		Handle: uint32(len(s.served) - 1), MaxIOBytes: maxTransfer, MaxRanges: maxRanges, MaxParallel: maxTransfers, //nolint:gosec // few
		PacketWindowOffset: window.Offset, PacketWindowLength: window.Length,
	}, window.FD, nil
}

func (s *fileServer) lookup(handle uint32) (*servedFile, error) {
	if uint64(handle) >= uint64(len(s.served)) || s.served[handle] == nil {
		return nil, fmt.Errorf("no file has handle %d", handle)
	}
	return s.served[handle], nil
}

// register takes a file of the sentry's as one end of transfers.
func (s *fileServer) register(req *stateipc.RegisterClientFileRequest, fds []int) (uint32, error) {
	f, err := s.lookup(req.Handle)
	if err != nil {
		return 0, err
	}
	if len(fds) != 1 || req.Size > maxClientMap || req.Writable == s.write {
		return 0, fmt.Errorf("%d files of %d bytes, writable %t: want one", len(fds), req.Size, req.Writable)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fds[0], &st); err != nil {
		return 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size < 0 || req.Size > uint64(st.Size) {
		return 0, fmt.Errorf("a file of mode %o and %d bytes, said to have %d", st.Mode, st.Size, req.Size)
	}
	dup, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	c := &clientFile{file: os.NewFile(uintptr(dup), "client"), size: req.Size, clone: f.sameDevice(st.Dev)}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.clients) >= maxClients {
		_ = c.file.Close() // nothing was written
		return 0, fmt.Errorf("more than %d files", maxClients)
	}
	f.clients = append(f.clients, c)
	return uint32(len(f.clients) - 1), nil //nolint:gosec // few
}

// sameDevice reports whether the served file lies on the device, so that sharing may work.
func (f *servedFile) sameDevice(dev uint64) bool {
	var st unix.Stat_t
	return f.file != nil && unix.Fstat(int(f.file.Fd()), &st) == nil && st.Dev == dev
}

func (s *fileServer) closeHandle(handle uint32) error {
	f, err := s.lookup(handle)
	if err != nil {
		return err
	}
	f.ep.Shutdown()
	<-f.done
	f.close()
	s.served[handle] = nil
	if f.piped && !s.write && !f.in.released() {
		s.awaitHangUp() // an answer, or this process's end, would let the guest run
	}
	return nil
}

// awaitHangUp waits until the sentry has hung up.
func (s *fileServer) awaitHangUp() {
	fds := []unix.PollFd{{Fd: int32(s.sock), Events: unix.POLLRDHUP}} //nolint:gosec // a descriptor
	for {
		if _, err := unix.Poll(fds, -1); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// close frees what the file holds, once run has returned.
func (f *servedFile) close() {
	f.ep.Destroy()
	for _, c := range f.clients {
		if c.mapping != nil {
			_ = unix.Munmap(c.mapping) // it was mapped by us
		}
		_ = c.file.Close() // the sentry has its own
	}
}

// run carries out transfers until the sentry has had enough or hangs up.
func (f *servedFile) run() {
	defer close(f.done)
	n, err := f.ep.RecvFirst()
	for err == nil {
		answers, last := f.answer(f.ep.Data(), n)
		if last {
			_ = f.ep.SendLast(answers) // the sentry is gone or has it
			return
		}
		n, err = f.ep.SendRecv(answers)
	}
}

// client returns a registered file, or nil.
func (f *servedFile) client(handle uint32) *clientFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	if uint64(handle) >= uint64(len(f.clients)) {
		return nil
	}
	return f.clients[handle]
}
