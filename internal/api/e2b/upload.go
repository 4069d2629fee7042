package e2b

import (
	"errors"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
)

// uploadLink says whether the files of a step are here, and where they are to be sent to. The link is there in any case: a
// client may insist on sending them.
func (s *server) uploadLink(w http.ResponseWriter, r *http.Request) error {
	if _, err := s.control.GetTemplate(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	hash := r.PathValue("hash")
	up, err := s.control.GetUpload(r.Context(), hash)
	if err != nil {
		return err
	}
	expires, signature := s.control.SignUpload(hash, time.Now())
	q := url.Values{"expires": {strconv.FormatInt(expires, 10)}, "signature": {signature}}
	return exchange.JSON(w, http.StatusCreated, struct {
		Present bool   `json:"present"`
		URL     string `json:"url"`
	}{up.Complete, s.ownAddress(r) + "/uploads/" + hash + "?" + q.Encode()})
}

// ownAddress is where the client reaches this server: as it just did. A proxy before the server may hide that it was
// reached through TLS; then it is the configured address that tells.
func (s *server) ownAddress(r *http.Request) string {
	configured := strings.TrimRight(s.control.About().APIURL, "/")
	u, err := url.Parse(configured)
	if r.Host == "" || err == nil && strings.EqualFold(u.Host, r.Host) {
		return configured
	}
	scheme := "http"
	if r.TLS != nil || strings.EqualFold(r.Header.Get("X-Forwarded-Proto"), "https") {
		scheme = "https"
	}
	return scheme + "://" + r.Host
}

// upload takes files whose link was signed; the signature is all that it needs.
func (s *server) upload(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	hash := r.PathValue("hash")
	expires, err := exchange.Int(values, "expires", 0, math.MaxInt64, 0)
	if err != nil {
		return err
	}
	if err := s.control.CheckUpload(hash, expires, values.Get("signature"), time.Now()); err != nil {
		return err
	}
	_, err = s.control.PutUpload(r.Context(), hash, r.ContentLength, exchange.SlowBody(w, r))
	if errors.Is(err, control.ErrNoSpace) {
		exchange.FailWith(w, http.StatusInsufficientStorage, err.Error())
		return nil
	}
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, struct{}{})
}
