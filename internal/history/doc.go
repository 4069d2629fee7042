// Package history keeps the past that people ask about: events.
//
// It owns an SQLite file, its schema and its retention. It decides nothing and must not be read to decide anything: the
// truth of the present is elsewhere, and events may be dropped by age. All SQL is in this package, and nothing of its
// API names SQLite, so that a server can keep its events in another database.
//
// A History is safe for concurrent use. Run is the one writer and must be going for Append to return; Query reads beside
// it. Nothing is locked across I/O.
package history
