package guest

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
)

const tokenHeader = "X-Access-Token"

// Operations that a signature may allow.
const (
	opRead  = "read"
	opWrite = "write"
)

// signaturePrefix names the way of signing.
const signaturePrefix = "v1_"

// requireToken lets a request through if no token is set, if it carries the token, or if its route checks by itself.
func (s *Server) requireToken(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := s.settings.get().token
		if token == "" || checksItself(r) || sameSecret(r.Header.Get(tokenHeader), token) {
			next.ServeHTTP(w, r)
			return
		}
		writeError(w, httpErrorf(http.StatusUnauthorized,
			"unauthorized access, please provide a valid access token or method signing if supported"))
	})
}

func checksItself(r *http.Request) bool {
	switch r.URL.Path {
	case "/health", "/files":
		return true
	case "/init":
		return r.Method == http.MethodPost
	}
	return false
}

// allowOrigins lets web pages of any origin call the agent: access is by token, never by cookie.
func allowOrigins(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Origin") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers", "*")
		if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST")
		h.Set("Access-Control-Allow-Headers", "*, Authorization")
		h.Set("Access-Control-Max-Age", "7200")
		w.WriteHeader(http.StatusNoContent)
	})
}

// sameSecret compares without telling by its duration where two secrets differ.
func sameSecret(got, want string) bool {
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// sign returns the signature that allows op on path as user; expiration is in Unix seconds, empty for none.
func sign(path, op, user, token, expiration string) string {
	text := path + ":" + op + ":" + user + ":" + token
	if expiration != "" {
		text += ":" + expiration
	}
	sum := sha256.Sum256([]byte(text))
	return signaturePrefix + base64.RawStdEncoding.EncodeToString(sum[:])
}

// authorizeFiles checks a request to /files, which needs the token or a signature once a token is set.
func authorizeFiles(r *http.Request, query url.Values, op, token string, now time.Time) error {
	if token == "" {
		return nil
	}
	if header := r.Header.Get(tokenHeader); header != "" {
		if sameSecret(header, token) {
			return nil
		}
		return httpErrorf(http.StatusUnauthorized, "access token present in header but does not match")
	}
	signature := query.Get("signature")
	if signature == "" {
		return httpErrorf(http.StatusUnauthorized, "missing signature query parameter")
	}
	return checkSignature(signature, query, op, token, now)
}

func checkSignature(signature string, query url.Values, op, token string, now time.Time) error {
	expiration := ""
	var expires int64
	if query.Has("signature_expiration") {
		var err error
		if expires, err = strconv.ParseInt(query.Get("signature_expiration"), 10, 64); err != nil {
			return httpErrorf(http.StatusBadRequest, "signature_expiration %q is not a number of seconds", query.Get("signature_expiration"))
		}
		expiration = strconv.FormatInt(expires, 10)
	}
	if !sameSecret(signature, sign(query.Get("path"), op, query.Get("username"), token, expiration)) {
		return httpErrorf(http.StatusUnauthorized, "invalid signature")
	}
	if expiration != "" && expires < now.Unix() {
		return httpErrorf(http.StatusUnauthorized, "signature is already expired")
	}
	return nil
}

// basicUser returns the user that an Authorization header names, or "" if it names none.
func basicUser(header string) (string, error) {
	scheme, encoded, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return "", nil
	}
	text, err := base64.StdEncoding.DecodeString(strings.TrimSpace(encoded))
	if err != nil {
		return "", fmt.Errorf("the Authorization header is not base64: %w", err)
	}
	user, _, ok := strings.Cut(string(text), ":")
	if !ok {
		return "", errors.New("the Authorization header has no colon after the user")
	}
	return user, nil
}

// rpcUser returns the account that a call acts as.
func (s *Server) rpcUser(ctx context.Context) (*account, error) {
	name, err := basicUser(rpcHeader(ctx, "Authorization"))
	if err != nil {
		return nil, connect.NewError(connect.CodeUnauthenticated, err)
	}
	a, err := s.account(name)
	if unknown := (*unknownUserError)(nil); errors.As(err, &unknown) {
		return nil, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("invalid username: '%s'", unknown.name))
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return a, nil
}

// httpUser returns the account that a plain request acts as.
func (s *Server) httpUser(name string) (*account, error) {
	a, err := s.account(name)
	if unknown := (*unknownUserError)(nil); errors.As(err, &unknown) {
		return nil, httpErrorf(http.StatusUnauthorized, "error looking up user '%s': %v", unknown.name, err)
	}
	return a, err
}

// account returns the account of a name, or, where there is none, of whoever requests act as by default.
func (s *Server) account(name string) (*account, error) {
	if name != "" {
		return s.users.lookup(name)
	}
	a, err := s.users.lookup(s.settings.get().user)
	if unknown := (*unknownUserError)(nil); errors.As(err, &unknown) {
		return s.users.fallback(), nil
	}
	return a, err
}

// rpcHeader returns a header of the call that ctx belongs to.
func rpcHeader(ctx context.Context, name string) string {
	info, ok := connect.CallInfoForHandlerContext(ctx)
	if !ok {
		return ""
	}
	return info.RequestHeader().Get(name)
}
