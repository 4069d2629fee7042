package guest

import (
	"bufio"
	"compress/gzip"
	"io"
	"net/http"
	"strconv"
	"strings"
)

const (
	encodingIdentity = "identity"
	encodingGzip     = "gzip"
)

// responseEncoding picks how a download is encoded from an Accept-Encoding header. Compressing costs the sandbox's
// processor and is slower than most networks, so it is done for a client that asks for it, with gzip alone or above
// the plain form, and not for one that merely lists everything it could decode.
func responseEncoding(header string) (string, error) {
	if strings.TrimSpace(header) == "" {
		return encodingIdentity, nil
	}
	quality := map[string]float64{}
	for item := range strings.SplitSeq(header, ",") {
		name, q := parseCoding(item)
		if name != "" {
			quality[name] = q
		}
	}
	gz, asked := quality[encodingGzip]
	if !asked {
		gz = quality["*"]
	}
	plain, named := quality[encodingIdentity]
	if wildcard, ok := quality["*"]; !named && ok && wildcard == 0 {
		named = true
	}
	switch {
	case named && plain == 0 && gz == 0:
		return "", httpErrorf(http.StatusNotAcceptable, "no acceptable encoding found, supported: [identity, gzip]")
	case named && plain < gz, asked && gz > 0 && len(quality) == 1:
		return encodingGzip, nil
	}
	return encodingIdentity, nil
}

// parseCoding reads one item of the header, as "gzip;q=0.5". A quality that cannot be read counts as 1.
func parseCoding(item string) (name string, q float64) {
	name, params, _ := strings.Cut(item, ";")
	q = 1
	for param := range strings.SplitSeq(params, ";") {
		if value, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(param)), "q="); ok {
			if parsed, err := strconv.ParseFloat(value, 64); err == nil && parsed >= 0 && parsed <= 1 {
				q = parsed
			}
		}
	}
	return strings.ToLower(strings.TrimSpace(name)), q
}

// requestBody returns an upload's body, decoded.
func requestBody(r *http.Request) (io.Reader, error) {
	name, _ := parseCoding(r.Header.Get("Content-Encoding"))
	switch name {
	case "", encodingIdentity:
		return r.Body, nil
	case encodingGzip:
		z, err := gzip.NewReader(bufio.NewReaderSize(r.Body, 64<<10))
		if err != nil {
			return nil, httpErrorf(http.StatusBadRequest, "the body is not gzip: %v", err)
		}
		return z, nil
	}
	return nil, httpErrorf(http.StatusBadRequest, "unsupported Content-Encoding: %s, supported: [gzip]", name)
}
