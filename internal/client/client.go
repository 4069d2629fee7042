package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// APIError is an answer that is not 2xx.
type APIError struct {
	// Code is the HTTP status.
	Code    int
	Message string
	// RetryAfter is when the server wants to be asked again; 0 where it does not say.
	RetryAfter time.Duration
	// RequestID names the request in the server's log.
	RequestID string
}

// Error returns the server's message.
func (e *APIError) Error() string { return e.Message }

// IsNotFound reports whether err is an answer that the thing asked for does not exist.
func IsNotFound(err error) bool { return hasCode(err, http.StatusNotFound) }

// IsConflict reports whether err is an answer that the thing's present state does not allow the operation.
func IsConflict(err error) bool { return hasCode(err, http.StatusConflict) }

// IsInvalid reports whether err is an answer that the request was wrong.
func IsInvalid(err error) bool { return hasCode(err, http.StatusBadRequest) }

// IsUnauthorized reports whether err is an answer that the key opens nothing.
func IsUnauthorized(err error) bool { return hasCode(err, http.StatusUnauthorized) }

// IsBusy reports whether err is an answer that trying again later can succeed.
func IsBusy(err error) bool {
	return hasCode(err, http.StatusServiceUnavailable) || hasCode(err, http.StatusTooManyRequests)
}

func hasCode(err error, code int) bool {
	var e *APIError
	return errors.As(err, &e) && e.Code == code
}

// Client calls the /v1 API. Its methods are bounded by their contexts alone.
type Client struct {
	base string
	key  string
	http *http.Client
}

const (
	dialTimeout = 5 * time.Second
	// maxAnswer bounds what is read of an answer, in bytes.
	maxAnswer = 64 << 20
)

// New returns a client of the server at baseURL, such as http://127.0.0.1:3000, with an API key.
func New(baseURL, key string) *Client {
	return &Client{base: strings.TrimRight(baseURL, "/"), key: key, http: &http.Client{Transport: transport("")}}
}

// NewLocal returns a client of the server on this machine through its unix socket, which needs no key.
func NewLocal(socket string) *Client {
	return &Client{base: "http://cloister", http: &http.Client{Transport: transport(socket)}}
}

func transport(socket string) *http.Transport {
	dialer := &net.Dialer{Timeout: dialTimeout}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, ForceAttemptHTTP2: true,
		MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute,
	}
	if socket != "" {
		t.Proxy = nil
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		}
	}
	return t
}

// Close closes the connections that are not in use.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call sends in, where it is not nil, and decodes the answer into out, where it is not nil.
func (c *Client) call(ctx context.Context, method, path string, in, out any) (http.Header, error) {
	req, err := c.request(ctx, method, path, in)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }() // read to its end below
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("%s %s: read the answer: %w", method, path, err)
	}
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("%s %s: the answer is larger than %d bytes", method, path, maxAnswer)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, apiError(resp, body)
	}
	if out == nil {
		return resp.Header, nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return nil, fmt.Errorf("%s %s: decode the answer: %w", method, path, err)
	}
	return resp.Header, nil
}

func (c *Client) request(ctx context.Context, method, path string, in any) (*http.Request, error) {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("%s %s: encode the request: %w", method, path, err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.key != "" {
		req.Header.Set("X-Api-Key", c.key)
	}
	return req, nil
}

func apiError(resp *http.Response, body []byte) error {
	e := &APIError{Code: resp.StatusCode, RequestID: resp.Header.Get("X-Request-Id")}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n >= 0 {
		e.RetryAfter = time.Duration(n) * time.Second
	}
	var w Error
	if json.Unmarshal(body, &w) == nil {
		e.Message = w.Message
	}
	if e.Message == "" {
		e.Message = "the server answered " + resp.Status
	}
	return e
}

// get is call for a read.
func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	var out T
	_, err := c.call(ctx, http.MethodGet, path, nil, &out)
	return out, err
}

// withQuery appends what is not empty.
func withQuery(path string, q url.Values) string {
	for name, values := range q {
		if len(values) == 1 && values[0] == "" {
			q.Del(name)
		}
	}
	if len(q) == 0 {
		return path
	}
	return path + "?" + q.Encode()
}

// number is the text of n, "" for 0.
func number(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// moment is the text of t, "" for the zero time.
func moment(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// pages yields every element of a list that comes in pages; an error is the last that it yields.
func pages[T any](page func(next string) ([]T, string, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for next, more := "", true; more; more = next != "" {
			items, following, err := page(next)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, v := range items {
				if !yield(v, nil) {
					return
				}
			}
			next = following
		}
	}
}
