package v1

import (
	"encoding/json"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/client"
)

type document struct {
	OpenAPI string
	Paths   map[string]map[string]struct {
		OperationID string
		Parameters  []struct{ Name, In string }
		Responses   map[string]any
	}
	Components struct {
		Schemas map[string]struct {
			Properties map[string]any
			Required   []string
			AllOf      []any
		}
	}
}

func readDocument(t *testing.T) document {
	t.Helper()
	var d document
	if err := json.Unmarshal(openAPI, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// Every served route is described, and every described route is served.
func TestOpenAPIMatchesRoutes(t *testing.T) {
	d := readDocument(t)
	if d.OpenAPI != "3.1.0" {
		t.Errorf("version %q", d.OpenAPI)
	}
	var described, served []string
	ids := map[string]bool{}
	for path, operations := range d.Paths {
		for method, op := range operations {
			described = append(described, strings.ToUpper(method)+" "+path)
			if op.OperationID == "" || ids[op.OperationID] {
				t.Errorf("%s %s: operationId %q is missing or used twice", method, path, op.OperationID)
			}
			ids[op.OperationID] = true
			if _, ok := op.Responses["401"]; !ok {
				t.Errorf("%s %s: no 401", method, path)
			}
			for _, wildcard := range regexp.MustCompile(`\{(\w+)\}`).FindAllStringSubmatch(path, -1) {
				if !slices.ContainsFunc(op.Parameters, func(p struct{ Name, In string }) bool { return p.Name == wildcard[1] && p.In == "path" }) {
					t.Errorf("%s %s: parameter %s is not described", method, path, wildcard[1])
				}
			}
		}
	}
	for _, r := range Routes(nil) {
		served = append(served, r.Pattern())
	}
	slices.Sort(described)
	slices.Sort(served)
	if diff := cmp.Diff(served, described); diff != "" {
		t.Errorf("served (-) and described (+) differ:\n%s", diff)
	}
}

// Every field of the wire types is described, and is required exactly where it is always written.
func TestOpenAPIMatchesWireTypes(t *testing.T) {
	d := readDocument(t)
	types := []any{
		client.Error{},
		client.Resources{},
		client.Status{},
		client.Member{},
		client.Node{},
		client.Taint{},
		client.UpdateNode{},
		client.DrainNode{},
		client.Drain{},
		client.DrainFailure{},
		client.Scheduler{},
		client.SchedulerPolicy{},
		client.SchedulerFactors{},
		client.SchedulerWeights{},
		client.ExplainSchedule{},
		client.Schedule{},
		client.ScheduledNode{},
		client.Sandbox{},
		client.CreateSandbox{},
		client.SetTimeout{},
		client.PauseSandbox{},
		client.ResumeSandbox{},
		client.CreateSnapshot{},
		client.Snapshot{},
		client.ForkSandbox{},
		client.Fork{},
		client.RollbackSandbox{},
		client.Metric{},
		client.LogEntry{},
		client.Template{},
		client.CreateTemplate{},
		client.Tag{},
		client.TemplateBuild{},
		client.GuestSettings{},
		client.BuildStep{},
		client.StartedBuild{},
		client.Upload{},
		client.SetTags{},
		client.UpdateTemplate{},
		client.PushTemplate{},
		client.Build{},
		client.Key{},
		client.CreateKey{},
		client.Token{},
		client.TokenUse{},
		client.CreateToken{},
		client.ClusterMember{},
		client.Proxy{},
		client.Event{},
	}
	seen := map[string]bool{"CreatedKey": true, "CreatedToken": true} // Key and Token, with more
	for _, v := range types {
		typ := reflect.TypeOf(v)
		schema, ok := d.Components.Schemas[typ.Name()]
		if !ok {
			t.Errorf("%s is not described", typ.Name())
			continue
		}
		seen[typ.Name()] = true
		var fields, required []string
		for field := range typ.Fields() {
			name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			fields = append(fields, name)
			if options == "" {
				required = append(required, name)
			}
		}
		slices.Sort(fields)
		if diff := cmp.Diff(fields, slices.Sorted(maps.Keys(schema.Properties))); diff != "" {
			t.Errorf("%s: fields:\n%s", typ.Name(), diff)
		}
		slices.Sort(required)
		slices.Sort(schema.Required)
		if diff := cmp.Diff(required, schema.Required); diff != "" && len(required)+len(schema.Required) > 0 {
			t.Errorf("%s: required:\n%s", typ.Name(), diff)
		}
	}
	for name := range d.Components.Schemas {
		if !seen[name] {
			t.Errorf("%s describes no wire type", name)
		}
	}
	for _, name := range regexp.MustCompile(`#/components/schemas/(\w+)`).FindAllStringSubmatch(string(openAPI), -1) {
		if _, ok := d.Components.Schemas[name[1]]; !ok {
			t.Errorf("%s is referred to and not described", name[1])
		}
	}
}
