// Package snapshot keeps a node's checkpoints: what an engine has saved of one moment of a sandbox.
//
// It owns one directory. A checkpoint in it is a directory of its own, named by its id, with a manifest and, in "state",
// the files of the engine; these are never written again, so that a copy of a checkpoint is a set of hard links. A checkpoint
// comes into its place in one step, with everything on the disk, and leaves it in one step. Names that begin with a dot are
// being made or being removed. It must not know what is in the engine's files, or decide how long a checkpoint is kept.
//
// A checkpoint travels as a Head and, for each file, the frames that extent.go describes; an Import writes them down, and
// goes on where an earlier one broke off.
//
// A Store is safe for concurrent use. Its mutex is never held across I/O; an id that somebody works on is in busy.
package snapshot
