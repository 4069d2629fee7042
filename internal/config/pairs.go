package config

import (
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxCores bounds a number of processors.
const maxCores = 1e6

// ParseNumbers reads NAME=NUMBER pairs of a setting into the places of their names. Errors: ErrInvalid.
func ParseNumbers(setting string, pairs []string, at map[string]*float64) error {
	for _, pair := range pairs {
		name, text, _ := strings.Cut(pair, "=")
		place, known := at[strings.TrimSpace(name)]
		value, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
		if !known || err != nil {
			return sandbox.Invalidf("%s: %.80q: want NAME=NUMBER, as docs/reference/config.md lists the names", setting, pair)
		}
		*place = value
	}
	return nil
}

// ParseAmounts reads cpu=NUMBER, memory=SIZE and disk=SIZE pairs of a setting. Errors: ErrInvalid.
func ParseAmounts(setting string, pairs []string) (sandbox.Resources, error) {
	var out sandbox.Resources
	for _, pair := range pairs {
		name, text, _ := strings.Cut(pair, "=")
		size, err := ParseSize(text)
		switch strings.TrimSpace(name) {
		case "memory":
			out.MemoryBytes = int64(size)
		case "disk":
			out.DiskBytes = int64(size)
		case "cpu":
			var cores float64
			cores, err = strconv.ParseFloat(strings.TrimSpace(text), 64)
			if !(cores >= 0 && cores <= maxCores) { // also what is no number
				err = strconv.ErrRange
			}
			out.MilliCPU = int64(cores * 1000)
		default:
			err = strconv.ErrSyntax
		}
		if err != nil {
			return out, sandbox.Invalidf("%s: %.80q: want cpu=NUMBER, memory=SIZE or disk=SIZE, as in memory=4GiB", setting, pair)
		}
	}
	return out, nil
}
