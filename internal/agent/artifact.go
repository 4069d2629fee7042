package agent

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// An artifact is got with one GET: /images/DIGEST?from=OFFSET or /checkpoints/ID?file=NAME&from=OFFSET. The answer's body is
// a head with its length before it (4 bytes, big endian), and what there is from that place on: the rest of the image, or
// the frames of the checkpoint's files as package snapshot describes them. It ends with the last byte of the last file; an
// answer that ends before has broken off. A guest that departs is got with GET /guests/ID?generation=NUMBER, once and as a whole.

// stallTimeout is how long the other side of a transfer may do nothing.
const stallTimeout = 30 * time.Second

// statuses pairs the kinds of error with what a peer is answered, the first that fits counts.
//
//nolint:gochecknoglobals // a table, never written
var statuses = []struct {
	kind   error
	status int
}{
	{sandbox.ErrNotFound, http.StatusNotFound},
	{sandbox.ErrInvalid, http.StatusBadRequest},
	{sandbox.ErrConflict, http.StatusConflict},
	{sandbox.ErrUnavailable, http.StatusServiceUnavailable},
}

// Artifacts serves what this node has to other members of the cluster. Whoever reaches it may have everything: the
// connection says who that is, and is checked where it arrives.
func (a *Agent) Artifacts() http.Handler {
	mux := http.NewServeMux()
	serve := func(pattern, number string, send func(w http.ResponseWriter, r *http.Request, n int64) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			n, err := strconv.ParseInt(r.URL.Query().Get(number), 10, 64)
			if err != nil || n < 0 {
				http.Error(w, number+": want a number", http.StatusBadRequest)
				return
			}
			out := &patientWriter{ResponseWriter: w, control: http.NewResponseController(w)}
			if err := send(out, r, n); err != nil {
				a.refuse(out, r, err)
			}
		})
	}
	serve("GET /images/{digest}", "from", a.sendImage)
	serve("GET /checkpoints/{id}", "from", a.sendCheckpoint)
	serve("GET /guests/{id}", "generation", a.sendGuest)
	return mux
}

// patientWriter gives whoever reads a while for each part.
type patientWriter struct {
	http.ResponseWriter
	control *http.ResponseController
	begun   bool
}

func (w *patientWriter) Write(p []byte) (int, error) {
	w.begun = true
	_ = w.control.SetWriteDeadline(time.Now().Add(stallTimeout)) // without it, the connection's own end counts
	return w.ResponseWriter.Write(p)
}

// Unwrap lets a ResponseController flush.
func (w *patientWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// refuse answers with an error, or breaks an answer off that has begun.
func (a *Agent) refuse(w *patientWriter, r *http.Request, err error) {
	if w.begun {
		a.log.WarnContext(r.Context(), "artifact not sent", slog.String("artifact", r.URL.Path), slog.Any("err", err))
		panic(http.ErrAbortHandler)
	}
	status := http.StatusInternalServerError
	for _, s := range statuses {
		if errors.Is(err, s.kind) {
			status = s.status
			break
		}
	}
	http.Error(w, err.Error(), status)
}

func (a *Agent) sendImage(w http.ResponseWriter, r *http.Request, from int64) error {
	im, f, err := a.images.Open(r.Context(), r.PathValue("digest"))
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	if from > im.Bytes {
		return sandbox.Invalidf("image %s from %d on: it has %d bytes", im.Digest, from, im.Bytes)
	}
	if err := writeHead(w, im); err != nil {
		return err
	}
	// Not io.Copy: each part needs its own while.
	buf := make([]byte, 1<<20)
	_, err = io.CopyBuffer(onlyWriter{w}, io.NewSectionReader(onlyReaderAt{f}, from, im.Bytes-from), buf)
	return err
}

// onlyWriter and onlyReaderAt hide what would copy everything at once.
type (
	onlyWriter   struct{ io.Writer }
	onlyReaderAt struct{ io.ReaderAt }
)

func (a *Agent) sendCheckpoint(w http.ResponseWriter, r *http.Request, from int64) error {
	id, first := r.PathValue("id"), r.URL.Query().Get("file")
	held, err := a.saves.Hold(id)
	if err != nil {
		return err
	}
	defer held.Release()
	parcel, err := a.parcelWith(id)
	if err != nil {
		return err
	}
	if err := writeHead(w, &snapshot.Head{Manifest: held.Manifest, Parcel: parcel}); err != nil {
		return err
	}
	return sendFrames(r.Context(), w, held, first, from)
}

// sendFrames writes the frames of all files from one on; "" means the first.
func sendFrames(ctx context.Context, w io.Writer, held *snapshot.Held, first string, from int64) error {
	for _, name := range held.Manifest.Names() {
		if name < first {
			continue
		}
		if name > first {
			from = 0
		}
		if err := held.Send(ctx, w, name, from); err != nil {
			return err
		}
	}
	return nil
}

// parcelWith returns what goes along with a checkpoint: the parcel of the sandbox that is paused or migrating in it, or the
// one that it came with; nil where there is neither.
func (a *Agent) parcelWith(id string) ([]byte, error) {
	if in := a.ownerOf(id); in != nil {
		p, err := a.parcelOf(in)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(p)
	}
	raw, err := a.saves.Parcel(id)
	if isNotFound(err) {
		return nil, nil
	}
	return raw, err
}

func writeHead(w io.Writer, head any) error {
	raw, err := json.Marshal(head)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(raw))), raw...)) //nolint:gosec // far below 2^32
	return err
}

// readArtifactHead reads what writeHead wrote, of at most so many bytes.
func readArtifactHead(r io.Reader, most int) ([]byte, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, sandbox.Unavailablef("the answer broke off: %v", err)
	}
	size := binary.BigEndian.Uint32(n[:])
	if uint64(size) > uint64(most) { //nolint:gosec // not negative
		return nil, sandbox.Invalidf("a head of %d bytes: want at most %d", size, most)
	}
	raw, err := io.ReadAll(io.LimitReader(r, int64(size))) // grows as it comes
	if err == nil && len(raw) < int(size) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, sandbox.Unavailablef("the answer broke off: %v", err)
	}
	return raw, nil
}
