package exchange

import (
	"io"
	"net/http"
	"time"
)

// stallTimeout is how long a client may send nothing in the middle of a large body.
const stallTimeout = time.Minute

// SlowBody is the body of a request that may be large and take long: every part of it has to come in time.
func SlowBody(w http.ResponseWriter, r *http.Request) io.Reader {
	return &slowBody{from: r.Body, conn: http.NewResponseController(w)}
}

type slowBody struct {
	from io.Reader
	conn *http.ResponseController
}

// Read implements io.Reader.
func (b *slowBody) Read(p []byte) (int, error) {
	_ = b.conn.SetReadDeadline(time.Now().Add(stallTimeout)) // what is no connection does not make one wait either
	n, err := b.from.Read(p)
	if err != nil {
		_ = b.conn.SetReadDeadline(time.Time{}) // as above
	}
	return n, err
}
