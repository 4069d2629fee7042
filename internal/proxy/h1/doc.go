// Package h1 reads and writes HTTP/1.1 as a proxy has to: heads in the buffer that they arrived in, bodies by their
// framing, without a map of header fields and without an opinion on what a request is for.
//
// It is strict with requests, since what two readers understand in two ways lets one request hide in another: what RFC
// 9112 lets a server refuse is refused. With answers it is as lenient as net/http, because they are always written anew.
// It does no I/O, starts nothing and knows none of our packages. Its values belong to one goroutine at a time.
package h1

import "fmt"

// Limits of what is read.
const (
	// MaxFields is the number of fields that a head or a trailer may have.
	MaxFields = 256
	// MaxTrailerBytes bounds a trailer section.
	MaxTrailerBytes = 16 << 10
	maxChunkLine    = 256
)

// Error says why a message cannot be taken, with the status that tells the one who sent it.
type Error struct {
	Status int
	Text   string
}

func (e *Error) Error() string { return e.Text }

func refuse(status int, format string, args ...any) error {
	return &Error{Status: status, Text: fmt.Sprintf(format, args...)}
}
