package sandbox

import (
	"errors"
	"fmt"
)

// The kinds of error. Each edge maps a kind to its own code in one table; everything else is an internal error.
var (
	// ErrNotFound means that the named thing does not exist.
	ErrNotFound = errors.New("not found")
	// ErrConflict means that the thing's present state does not allow the operation.
	ErrConflict = errors.New("conflict")
	// ErrInvalid means that the caller's input is wrong; the text says what was seen and what would be right.
	ErrInvalid = errors.New("invalid")
	// ErrExhausted means that there is no room now; trying again later, or elsewhere, can succeed.
	ErrExhausted = errors.New("exhausted")
	// ErrUnavailable means that a needed part does not answer now.
	ErrUnavailable = errors.New("unavailable")
	// ErrDenied means that the caller may not do this.
	ErrDenied = errors.New("denied")
	// ErrUnsupported means that the engine or machine in use cannot do this at all.
	ErrUnsupported = errors.New("unsupported")
)

// kinded is a message for people with a kind for programs.
type kinded struct {
	kind error
	text string
}

func (e *kinded) Error() string { return e.text }
func (e *kinded) Unwrap() error { return e.kind }

// NotFoundf returns an ErrNotFound with the formatted text and nothing else as its message.
func NotFoundf(format string, args ...any) error { return newKinded(ErrNotFound, format, args) }

// Conflictf returns an ErrConflict with the formatted text.
func Conflictf(format string, args ...any) error { return newKinded(ErrConflict, format, args) }

// Invalidf returns an ErrInvalid with the formatted text.
func Invalidf(format string, args ...any) error { return newKinded(ErrInvalid, format, args) }

// Exhaustedf returns an ErrExhausted with the formatted text.
func Exhaustedf(format string, args ...any) error { return newKinded(ErrExhausted, format, args) }

// Unavailablef returns an ErrUnavailable with the formatted text.
func Unavailablef(format string, args ...any) error { return newKinded(ErrUnavailable, format, args) }

// Deniedf returns an ErrDenied with the formatted text.
func Deniedf(format string, args ...any) error { return newKinded(ErrDenied, format, args) }

// Unsupportedf returns an ErrUnsupported with the formatted text.
func Unsupportedf(format string, args ...any) error { return newKinded(ErrUnsupported, format, args) }

func newKinded(kind error, format string, args []any) error {
	return &kinded{kind: kind, text: fmt.Sprintf(format, args...)}
}
