package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// maxLoopbackHead bounds what a guest may say before its connection is handed on.
	maxLoopbackHead = 1 << 10
	// loopbackTimeout bounds how long a guest may take for that.
	loopbackTimeout = 5 * time.Second
)

// dialPort connects to a port inside. A server that listens on the sandbox's loopback alone, as many do while one
// develops with them, refuses at the sandbox's address; then the agent inside connects to it.
func (a *Agent) dialPort(ctx context.Context, in *instance, addr string, port uint16) (net.Conn, error) {
	c, err := a.dial(ctx, "tcp", addr)
	if err == nil || port == a.cfg.GuestPort || !errors.Is(err, syscall.ECONNREFUSED) {
		return c, err
	}
	c, failed := a.dialLoopback(ctx, in, port)
	if failed != nil {
		return nil, err // what the agent says adds nothing: nobody listens
	}
	return c, nil
}

// dialLoopback has the agent inside connect to a port of the sandbox's loopback.
func (a *Agent) dialLoopback(ctx context.Context, in *instance, port uint16) (net.Conn, error) {
	r := in.record()
	token, err := a.token(in.id)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, loopbackTimeout)
	defer cancel()
	c, err := a.dial(ctx, "tcp", a.guestAddr(&r.Network))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	err = askLoopback(ctx, c, token, port)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("dial port %d of sandbox %s through its agent: %w", port, in.id, err)
	}
	return c, nil
}

// askLoopback asks on a fresh connection to the agent for a port, and reads no further than the head of its answer.
func askLoopback(ctx context.Context, c net.Conn, token string, port uint16) error {
	req, err := guestRequest(ctx, http.MethodGet, "/loopback?port="+strconv.Itoa(int(port)), token, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "tcp")
	if err := req.Write(c); err != nil {
		return err
	}
	head, err := readHead(c)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(head, "HTTP/1.1 101 ") {
		line, _, _ := strings.Cut(head, "\r\n")
		return fmt.Errorf("the agent answered %.80q", line)
	}
	return nil
}

// readHead reads up to an empty line, a byte at a time: what follows belongs to whoever gets the connection.
func readHead(r io.Reader) (string, error) {
	var head []byte
	var one [1]byte
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if len(head) == maxLoopbackHead {
			return "", fmt.Errorf("no end of the head within %d bytes", maxLoopbackHead)
		}
		if _, err := io.ReadFull(r, one[:]); err != nil {
			return "", err
		}
		head = append(head, one[0])
	}
	return string(head), nil
}
