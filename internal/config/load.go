package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// envName is the environment variable of a setting.
func envName(name string) string {
	return "CLOISTER_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// Load returns the settings: flags that were given, over the environment, over the file, over the defaults. Its errors
// name the setting, the value, and what would be right.
func Load(flags *pflag.FlagSet, environ []string) (*Config, error) {
	c := Default()
	set := pflag.NewFlagSet("settings", pflag.ContinueOnError)
	c.register(set)
	env := make(map[string]string, len(environ))
	for _, kv := range environ {
		if k, v, ok := strings.Cut(kv, "="); ok {
			env[k] = v
		}
	}
	file := env["CLOISTER_CONFIG"]
	if f := flags.Lookup("config"); f != nil && f.Changed {
		file = f.Value.String()
	}
	if file != "" {
		if err := readFile(set, file); err != nil {
			return nil, err
		}
	}
	var problems []error
	set.VisitAll(func(f *pflag.Flag) {
		if v, ok := env[envName(f.Name)]; ok && v != "" {
			problems = append(problems, assign(f, envName(f.Name), []string{v}))
		}
		if given := flags.Lookup(f.Name); given != nil && given.Changed {
			problems = append(problems, assign(f, "--"+f.Name, values(given)))
		}
	})
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	c.derive()
	if err := c.validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// values returns what a flag holds, one entry per element of a list.
func values(f *pflag.Flag) []string {
	if list, ok := f.Value.(pflag.SliceValue); ok {
		return list.GetSlice()
	}
	return []string{f.Value.String()}
}

// assign gives a setting a new value; from says where it comes from.
func assign(f *pflag.Flag, from string, to []string) error {
	var err error
	if list, ok := f.Value.(pflag.SliceValue); ok {
		if len(to) == 1 {
			to = splitList(to[0])
		}
		err = list.Replace(to)
	} else {
		err = f.Value.Set(strings.Join(to, ","))
	}
	if err != nil {
		return fmt.Errorf("%s: value %q: %w", from, strings.Join(to, ","), err)
	}
	return nil
}

func splitList(text string) []string {
	var out []string
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}

// maxFile bounds the size of the file, in bytes.
const maxFile = 1 << 20

// readFile applies a YAML file of settings. Every key must be the name of one.
func readFile(set *pflag.FlagSet, name string) error {
	f, err := os.Open(name) //nolint:gosec // the user names the file
	if err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	if len(text) > maxFile {
		return fmt.Errorf("read settings: %s is larger than %d bytes", name, maxFile)
	}
	if err := apply(set, text); err != nil {
		return fmt.Errorf("settings file %s: %w", name, err)
	}
	return nil
}

func apply(set *pflag.FlagSet, text []byte) error {
	var keys map[string]yaml.Node
	if err := yaml.Unmarshal(text, &keys); err != nil {
		return err
	}
	var problems []error
	for name, node := range keys {
		f := set.Lookup(name)
		if f == nil {
			problems = append(problems, fmt.Errorf("line %d: unknown setting %q; docs/reference/config.md lists all", node.Line, name))
			continue
		}
		to, err := scalars(&node)
		if err != nil {
			problems = append(problems, fmt.Errorf("line %d: setting %s: %w", node.Line, name, err))
			continue
		}
		problems = append(problems, assign(f, fmt.Sprintf("line %d: setting %s", node.Line, name), to))
	}
	return errors.Join(problems...)
}

// scalars returns a plain value, or the elements of a list of plain values.
func scalars(node *yaml.Node) ([]string, error) {
	switch node.Kind {
	case yaml.ScalarNode:
		return []string{node.Value}, nil
	case yaml.SequenceNode:
		out := make([]string, 0, len(node.Content))
		for _, n := range node.Content {
			if n.Kind != yaml.ScalarNode {
				return nil, errors.New("want a list of plain values")
			}
			out = append(out, n.Value)
		}
		return out, nil
	case yaml.DocumentNode, yaml.MappingNode, yaml.AliasNode:
	}
	return nil, errors.New("want a plain value or a list of them")
}

// derive fills what follows from other settings.
func (c *Config) derive() {
	if abs, err := filepath.Abs(c.DataDir); err == nil {
		c.DataDir = abs
	}
	if c.CacheDir == "" {
		c.CacheDir = filepath.Join(c.DataDir, "cache")
	}
	if c.NodeName == "" {
		c.NodeName = "localhost"
		if name, err := os.Hostname(); err == nil {
			c.NodeName = name
		}
	}
	scheme := "http://"
	if c.TLSCert != "" {
		scheme = "https://"
	}
	if c.PublicAPIURL == "" {
		c.PublicAPIURL = scheme + c.APIAddr
	}
	if c.PublicProxyURL == "" {
		c.PublicProxyURL = scheme + c.ProxyAddr
	}
}
