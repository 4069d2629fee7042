// Package image turns sources into root file systems and keeps the node's cache of them.
//
// A source (a registry's image, an OCI layout, a docker archive, a directory, a Debian suite) becomes a file tree in
// memory, is fitted out for sandboxes (guest agent, user, device directories) and is written as one EROFS image, which is
// named by its SHA-256 digest, written to a temporary place, flushed and moved into the cache in one step. Whatever ends
// the process in the middle leaves nothing that counts, and Recover clears it away.
//
// It must not decide which image a template uses, nor know about sandboxes or engines. All methods of a Store are safe for
// concurrent use; equal requests share one build. One Store owns a directory at a time: the caller sees to that. Two locks,
// never held together: Store.mu guards the tables of running builds and imports and is not held during I/O; Store.keeping guards the
// directory of layers.
//
// A template's build adds layers: a Recorder makes one of what each step changed, Compose puts them on top of an image and
// so makes another, and cached steps remember the layer that they made. Prune frees what nothing refers to.
package image

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// GuestPath is where each image has the guest agent.
const GuestPath = "/usr/local/bin/cloister-guest"

const (
	defaultAnswerTimeout = 5 * time.Second
	defaultCacheAge      = 30 * 24 * time.Hour
	defaultCacheBytes    = 10 << 30
)

// Config is what a Store needs. Only Dir is required.
type Config struct {
	// Dir is the directory that the store owns.
	Dir string
	// CacheDir holds what can be fetched or made again, and may be shared by stores; empty means cache in Dir.
	CacheDir string
	// Guest returns the agent put into each image at GuestPath; it is asked once a build, so that nobody has to keep the
	// agent in memory. Nil leaves it out.
	Guest  func() ([]byte, error)
	Logger *slog.Logger
	// Nameservers go into each image's resolv.conf.
	Nameservers []string
	// Limits bound each image; zero means tree.DefaultLimits.
	Limits tree.Limits
	// AnswerTimeout is how long a registry has for its first answer; zero means 5 s.
	AnswerTimeout time.Duration
	// AptDir is the machine's apt configuration; empty means /etc/apt.
	AptDir string
	// CacheAge is how long a bootstrapped Debian tree is used again; zero means 30 days. An older one is still used, with
	// a warning, when a new one cannot be made.
	CacheAge time.Duration
	// CacheBytes bounds the layers of cached build steps, in bytes; zero means 10 GiB. Prune keeps to it.
	CacheBytes int64
}

// Request says what to build. Of equal requests at the same time only one is carried out.
type Request struct {
	// Sources are tried in order; ParseSource says what they look like.
	Sources []string
	// Username and Password are for registries; empty means the machine's own docker credentials.
	Username, Password string
	// RegistryOnly refuses every source that is not a registry's with ErrDenied. All others read the node's disk or run its
	// programs, which only the machine's owner may ask for.
	RegistryOnly bool
}

// Progress is one step forward.
type Progress struct {
	// Step is from a closed set: "source", "pull", "bootstrap", "unpack", "finalize", "pack", "push".
	Step string
	// Fraction of the whole build that is done, 0 to 1. It starts again when the next source is tried.
	Fraction float64
	// Message is a sentence for people; empty where only the fraction changed.
	Message string
}

// RunConfig is what an image says about running it.
type RunConfig struct {
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkDir    string   `json:"work_dir,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	// Labels are the image's notes; those that Push writes are named there.
	Labels map[string]string `json:"labels,omitempty"`
}

// Image is a root file system in the cache.
type Image struct {
	// Digest of the EROFS file, "sha256:" and 64 hex digits.
	Digest string `json:"digest"`
	Bytes  int64  `json:"bytes"`
	// Source is the one of the request's sources that worked; Resolved pins it where it can change ("name@sha256:...").
	Source   string `json:"source"`
	Resolved string `json:"resolved,omitempty"`
	// GuestDigest is that of the agent inside; empty where there is none.
	GuestDigest string    `json:"guest_digest,omitempty"`
	CreatedAt   time.Time `json:"created_at"`
	Config      RunConfig `json:"config"`
	// Base is the image that this one was composed of, and Layers what lies on top of it, lowest first. Both are empty for
	// an image that was built from a source.
	Base   string   `json:"base,omitempty"`
	Layers []string `json:"layers,omitempty"`
	// Fetched means that it was got from elsewhere: of what Layers names, only what was made here is here.
	Fetched bool `json:"fetched,omitempty"`
}

// Store builds images and keeps them.
type Store struct {
	cfg   Config
	log   *slog.Logger
	tools tools

	mu      sync.Mutex
	flights map[string]*flight
	// importing are the digests of images that are being got from elsewhere.
	importing map[string]bool

	// keeping makes putting a layer in its place and freeing one exclude each other. Unlike mu it is held during renames
	// and removals, because what it guards is the directory; no data is copied meanwhile.
	keeping sync.Mutex
	// fresh says since when layers are there that nothing may refer to yet.
	fresh map[string]time.Time
	// prunes is how many Prunes run.
	prunes int
}

// tools are the programs that the store runs; tests put others in their place.
type tools struct {
	debootstrap string
	keyringDir  string
	scriptDir   string
}

// New opens the store in cfg.Dir and makes the directory where it is missing. It cleans nothing up: Recover does.
func New(cfg Config) (*Store, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, sandbox.Invalidf("image directory %q is not an absolute path", cfg.Dir)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Limits == (tree.Limits{}) {
		cfg.Limits = tree.DefaultLimits()
	}
	if len(cfg.Nameservers) == 0 {
		cfg.Nameservers = []string{"1.1.1.1", "8.8.8.8"}
	}
	if cfg.AnswerTimeout == 0 {
		cfg.AnswerTimeout = defaultAnswerTimeout
	}
	if cfg.CacheDir == "" {
		cfg.CacheDir = filepath.Join(cfg.Dir, "cache")
	}
	if !filepath.IsAbs(cfg.CacheDir) {
		return nil, sandbox.Invalidf("cache directory %q is not an absolute path", cfg.CacheDir)
	}
	if cfg.AptDir == "" {
		cfg.AptDir = "/etc/apt"
	}
	if cfg.CacheAge == 0 {
		cfg.CacheAge = defaultCacheAge
	}
	if cfg.CacheBytes == 0 {
		cfg.CacheBytes = defaultCacheBytes
	}
	s := &Store{cfg: cfg, log: cfg.Logger, flights: map[string]*flight{}, importing: map[string]bool{}, fresh: map[string]time.Time{}, tools: tools{
		debootstrap: "debootstrap", keyringDir: "/usr/share/keyrings", scriptDir: "/usr/share/debootstrap/scripts",
	}}
	for _, dir := range []string{s.imageDir(), s.tempDir(), s.debDir(), s.debianDir(), s.layerDir(), s.stepDir(), s.composedDir(), s.blobDir(), s.partialDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open image store: %w", err)
		}
	}
	return s, nil
}

func (s *Store) imageDir() string  { return filepath.Join(s.cfg.Dir, "images") }
func (s *Store) tempDir() string   { return filepath.Join(s.cfg.Dir, "tmp") }
func (s *Store) debDir() string    { return filepath.Join(s.cfg.CacheDir, "debs") }
func (s *Store) debianDir() string { return filepath.Join(s.cfg.CacheDir, "debian") }

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}
