package config

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/spf13/pflag"
)

const redacted = "[redacted]"

// Redacted returns every setting with its value, secrets left out, in the order of the struct.
func (c *Config) Redacted() string {
	set := pflag.NewFlagSet("settings", pflag.ContinueOnError)
	shown := *c
	shown.register(set)
	var b strings.Builder
	for field := range fields() {
		value := strings.Join(values(set.Lookup(field.Get("name"))), ",")
		if field.Get("secret") != "" && value != "" {
			value = redacted
		}
		fmt.Fprintf(&b, "%s: %s\n", field.Get("name"), value)
	}
	return b.String()
}

// Reference returns the page of the user's guide that describes every setting.
func Reference() string {
	set := pflag.NewFlagSet("settings", pflag.ContinueOnError)
	Default().register(set)
	var b strings.Builder
	b.WriteString("# Settings\n\nGenerated from `internal/config`; `go test ./internal/config -update` writes it anew.\n\n" +
		"Each setting has a flag of `cloister up` (`--data-dir`), an environment variable (`CLOISTER_DATA_DIR`) and a key in the YAML\n" +
		"file that `--config` or `CLOISTER_CONFIG` names (`data-dir`). A flag goes before the environment, the environment before the file.\n" +
		"Sizes are written as `512MiB` or `10GiB`, times as `90s`, `30m` or `24h`, lists as `a,b` or as YAML lists.\n")
	for field := range fields() {
		if group := field.Get("group"); group != "" {
			fmt.Fprintf(&b, "\n## %s\n\n| Setting | Default | Meaning |\n|---|---|---|\n", group)
		}
		def := strings.Join(values(set.Lookup(field.Get("name"))), ",")
		if def != "" {
			def = "`" + def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", field.Get("name"), def, strings.ReplaceAll(field.Get("help"), "|", `\|`))
	}
	return b.String()
}

// fields yields the tags of Config's fields in order.
func fields() func(yield func(reflect.StructTag) bool) {
	return func(yield func(reflect.StructTag) bool) {
		for f := range reflect.TypeFor[Config]().Fields() {
			if !yield(f.Tag) {
				return
			}
		}
	}
}
