package api_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/api/apitest"
)

// ID stands for the id of a running sandbox in the tables below.
func TestRoutes(t *testing.T) {
	tests := []struct {
		method, target, body string
		status               int
		want                 string // part of the body
	}{
		{"GET", "/health", "", 200, "ok"},
		{"GET", "/healthz", "", 200, "ok"},

		{"POST", "/v2/sandboxes", `{"templateID":"base"}`, 201, `"envdVersion":"0.6.13"`},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":60,"metadata":{"a":"b"},"envVars":{"A":"b"},"mcp":null,"network":{},"unknown":[1]}`, 201, `"domain":null`},
		{"POST", "/v2/sandboxes", `{"templateID":"base","autoPause":false,"autoResume":{"enabled":false},"allow_internet_access":null}`, 201, `"trafficAccessToken":null`},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"denyOut":["0.0.0.0/0"],"allowPublicTraffic":true}}`, 201, ""},
		{"POST", "/v2/sandboxes", ``, 400, "the body is empty"},
		{"POST", "/v2/sandboxes", `{`, 400, "not JSON, at byte 1"},
		{"POST", "/v2/sandboxes", `[]`, 400, "want a JSON object"},
		{"POST", "/v2/sandboxes", `{"templateID":"base"}{}`, 400, "not JSON"},
		{"POST", "/v2/sandboxes", `{}`, 400, "templateID is missing"},
		{"POST", "/v2/sandboxes", `{"templateID":5}`, 400, `field \"templateID\" is a number: want a text`},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":"5"}`, 400, `field \"timeout\" is a string: want a whole number`},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":1.5}`, 400, "want a whole number"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":0}`, 400, "timeout 0: want at least 1"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":-1}`, 400, "timeout -1: want at least 1"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":9000000000}`, 400, "timeout 9000000000: want at most"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":86401}`, 400, "want 1 to 86400"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","metadata":{"a":1}}`, 400, "want a text"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","metadata":[]}`, 400, "want an object"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","envVars":{"A=":"1"}}`, 400, "environment variable"},
		{"POST", "/v2/sandboxes", `{"templateID":"nope"}`, 404, "does not exist"},
		{"POST", "/v2/sandboxes", `{"templateID":"a b"}`, 400, "template name"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","autoPause":true,"autoPauseMemory":false}`, 201, ""},
		{"POST", "/v2/sandboxes", `{"templateID":"base","autoPause":true,"autoResume":{"enabled":true}}`, 501, "autoResume"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}}`, 400, "cannot be combined with autoResume"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","mcp":{"x":{}}}`, 201, `"sandboxID"`},
		{"POST", "/v2/sandboxes", `{"templateID":"base","volumeMounts":[{"name":"a","path":"/b"}]}`, 501, "volumeMounts"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","iam":{"tokens":{"a":{}}}}`, 501, "iam"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"allowOut":["1.1.1.1"]}}`, 501, "network"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"denyOut":["1.1.1.1"]}}`, 501, "network"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"rules":{"a":[]}}}`, 501, "rules"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"egressProxy":{"address":"a:1"}}}`, 501, "egressProxy"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"allowPublicTraffic":false}}`, 501, "allowPublicTraffic"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"maskRequestHost":"x"}}`, 501, "maskRequestHost"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"httpsPorts":[1]}}`, 501, "httpsPorts"},
		{"POST", "/sandboxes", `{"templateID":"base"}`, 201, ""},
		{"POST", "/sandboxes", `{"templateID":"base","secure":true}`, 201, `"envdAccessToken":"`},

		{"POST", "/v2/sandboxes/ID/connect", ``, 200, `"envdAccessToken":"`},
		{"POST", "/v2/sandboxes/ID/connect", `{"timeout":600,"memory":false}`, 200, `"sandboxID":"ID"`},
		{"POST", "/v2/sandboxes/ID-12345678/connect", `{}`, 200, `"sandboxID":"ID"`},
		{"POST", "/v2/sandboxes/ID/connect", `{"timeout":-5}`, 400, "timeout -5"},
		{"POST", "/v2/sandboxes/" + absent + "/connect", `{}`, 404, "was not found"},
		{"POST", "/sandboxes/ID/connect", `{"timeout":600}`, 200, `"sandboxID":"ID"`},
		{"POST", "/sandboxes/ID/connect", `{}`, 400, "timeout is missing"},
		{"POST", "/sandboxes/ID/connect", ``, 400, "the body is empty"},
		{"POST", "/sandboxes/" + absent + "/connect", `{"timeout":1}`, 404, "was not found"},

		{"GET", "/v2/sandboxes", "", 200, `"sandboxID":"ID"`},
		{"GET", "/v2/sandboxes?state=running,paused&limit=1&order=asc&template=base&startedAfter=2020-01-01T00:00:00.000Z", "", 200, `"state":"running"`},
		{"GET", "/v2/sandboxes?state=paused", "", 200, "[]"},
		{"GET", "/v2/sandboxes?state=failed", "", 400, "state"},
		{"GET", "/v2/sandboxes?limit=0", "", 400, "limit"},
		{"GET", "/v2/sandboxes?limit=101", "", 400, "whole number from 1 to 100"},
		{"GET", "/v2/sandboxes?limit=x", "", 400, "limit"},
		{"GET", "/v2/sandboxes?order=up", "", 400, "order"},
		{"GET", "/v2/sandboxes?startedAfter=yesterday", "", 400, "startedAfter"},
		{"GET", "/v2/sandboxes?nextToken=%00", "", 400, "next token"},
		{"GET", "/v2/sandboxes?metadata=%25zz", "", 400, "metadata filter"},
		{"GET", "/v2/sandboxes?metadata=a%3Db%26a%3Dc", "", 400, "2 times"},
		{"GET", "/v2/sandboxes?a=%zz", "", 400, "query"},
		{"GET", "/sandboxes", "", 200, `"sandboxID":"ID"`},
		{"GET", "/sandboxes?metadata=none%3Dof", "", 200, "[]"},

		{"GET", "/sandboxes/ID", "", 200, `"lifecycle":{"onTimeout":"kill","autoResume":false}`},
		{"GET", "/sandboxes/ID", "", 200, `"volumeMounts":[]`},
		{"HEAD", "/sandboxes/ID", "", 200, ""},
		{"GET", "/sandboxes/" + absent, "", 404, "was not found"},
		{"GET", "/sandboxes/..%2F..%2Fetc", "", 404, "was not found"},
		{"GET", "/sandboxes/%00", "", 404, "was not found"},
		{"GET", "/sandboxes/" + strings.Repeat("a", 500), "", 404, "was not found"},
		{"POST", "/sandboxes/ID/timeout", `{"timeout":30}`, 204, ""},
		{"POST", "/sandboxes/ID/timeout", `{}`, 400, "timeout is missing"},
		{"POST", "/sandboxes/ID/timeout", `{"timeout":-1}`, 400, "timeout -1"},
		{"POST", "/sandboxes/ID/timeout", `{"timeout":100000}`, 400, "want 0 to 86400"},
		{"POST", "/sandboxes/" + absent + "/timeout", `{"timeout":30}`, 404, ""},
		{"POST", "/sandboxes/ID/refreshes", ``, 204, ""},
		{"POST", "/sandboxes/ID/refreshes", `{"duration":60}`, 204, ""},
		{"POST", "/sandboxes/ID/refreshes", `{"duration":-1}`, 400, "duration"},
		{"POST", "/sandboxes/ID/resume", `{"timeout":5}`, 409, "is running"},
		{"POST", "/sandboxes/" + absent + "/resume", `{}`, 404, ""},

		{"GET", "/sandboxes/ID/metrics", "", 200, `"cpuUsedPct":12.5`},
		{"GET", "/sandboxes/ID/metrics?start=1&end=99999999999", "", 200, `"timestampUnix"`},
		{"GET", "/sandboxes/ID/metrics?start=5&end=1", "", 400, "before start"},
		{"GET", "/sandboxes/ID/metrics?start=-5", "", 400, "start"},
		{"GET", "/sandboxes/ID/metrics?start=99999999999999999999", "", 400, "start"},
		{"GET", "/sandboxes/" + absent + "/metrics", "", 404, ""},
		{"GET", "/sandboxes/metrics?sandbox_ids=ID," + absent, "", 200, `{"sandboxes":{"ID":{`},
		{"GET", "/sandboxes/metrics", "", 400, "sandbox_ids"},
		{"GET", "/sandboxes/metrics?sandbox_ids=A!", "", 400, "sandbox id"},

		{"GET", "/sandboxes/ID/logs", "", 200, `\"logger\":\"process\"`},
		{"GET", "/sandboxes/ID/logs?start=0&limit=1", "", 200, `"logEntries":[{`},
		{"GET", "/sandboxes/ID/logs?limit=0", "", 400, "limit"},
		{"GET", "/sandboxes/" + absent + "/logs", "", 404, ""},
		{"GET", "/v2/sandboxes/ID/logs?level=warn&direction=backward&limit=1", "", 200, `"level":"error"`},
		{"GET", "/v2/sandboxes/ID/logs?search=of+warn", "", 200, `{"logs":[{`},
		{"GET", "/v2/sandboxes/ID/logs?search=nothing", "", 200, `{"logs":[]}`},
		{"GET", "/v2/sandboxes/ID/logs?level=loud", "", 400, "level"},
		{"GET", "/v2/sandboxes/ID/logs?direction=up", "", 400, "direction"},

		{"GET", "/templates", "", 200, `"aliases":["base"]`},
		{"GET", "/templates?teamID=default", "", 200, `"buildStatus":"ready"`},
		{"GET", "/templates/base", "", 200, `"templateID":"base0template0id0000"`},
		{"GET", "/templates/nope", "", 404, ""},
		{"GET", "/templates/aliases/base", "", 200, `{"templateID":"base0template0id0000","public":false}`},
		{"GET", "/templates/aliases/nope", "", 404, ""},
		{"GET", "/templates/aliases/a%20b", "", 400, ""},
		{"GET", "/templates/base/tags", "", 200, `[{"tag":"default","buildID":"`},
		{"GET", "/templates/base/else", "", 404, "no operation"},
		{"DELETE", "/templates/team%2Fsnap%3Atag", "", 404, `team/snap:tag`},
		{"DELETE", "/templates/base", "", 409, ""},
		{"GET", "/teams", "", 200, `"isDefault":true`},
		{"GET", "/nodes", "", 200, `"status":"ready"`},

		{"POST", "/sandboxes/ID/snapshots", `{"name":"snap:v1"}`, 201, `{"snapshotID":"snap:v1","names":["snap:v1"]}`},
		{"POST", "/sandboxes/ID/snapshots", `{}`, 201, `:default","names":[]}`},
		{"POST", "/sandboxes/ID/snapshots", ``, 201, `"names":[]`},
		{"POST", "/sandboxes/ID/snapshots", `{"name":"base"}`, 409, "no snapshot"},
		{"POST", "/sandboxes/ID/snapshots", `{"name":"a b"}`, 400, "template name"},
		{"POST", "/sandboxes/" + absent + "/snapshots", `{}`, 404, ""},
		{"GET", "/snapshots", "", 200, `"snapshotID":"snap:v1"`},
		{"GET", "/snapshots?sandboxID=ID&name=snap:v1&limit=1", "", 200, `[{"snapshotID":"snap:v1","names":["snap:v1"]}]`},
		{"GET", "/snapshots?name=none", "", 200, "[]"},
		{"GET", "/snapshots?limit=101", "", 400, "limit"},
		{"GET", "/snapshots?nextToken=nope", "", 400, "next token"},
		{"GET", "/snapshots?sandboxID=A%21", "", 400, "sandbox id"},
		{"POST", "/v2/sandboxes", `{"templateID":"snap:v1"}`, 201, `"alias":"snap:v1"`},
		{"POST", "/sandboxes/ID/fork", ``, 201, `[{"sandbox":{"sandboxID":"`},
		{"POST", "/sandboxes/ID/fork", `{"count":2,"timeout":60}`, 201, `},{"sandbox":{`},
		{"POST", "/sandboxes/ID/fork", `{"count":0}`, 400, "count 0: want 1 to 100"},
		{"POST", "/sandboxes/ID/fork", `{"count":101}`, 400, "count 101"},
		{"POST", "/sandboxes/ID/fork", `{"timeout":0}`, 400, "want 1 to"},
		{"POST", "/sandboxes/" + absent + "/fork", `{}`, 404, ""},
		{"POST", "/sandboxes/ID/pause", `{"memory":5}`, 400, "memory"},
		{"POST", "/sandboxes/ID/pause", `{}`, 204, ""},
		{"POST", "/sandboxes/ID/pause", ``, 409, "already"},
		{"POST", "/sandboxes/" + absent + "/pause", `{}`, 404, ""},
		{"GET", "/v2/sandboxes?state=paused", "", 200, `"sandboxID":"ID"`},
		{"GET", "/sandboxes/ID", "", 200, `"state":"paused"`},
		{"GET", "/sandboxes/ID/metrics", "", 200, ""},
		{"POST", "/sandboxes/ID/timeout", `{"timeout":30}`, 404, "is paused"},
		{"POST", "/sandboxes/ID/refreshes", ``, 404, "is paused"},
		{"POST", "/sandboxes/ID/fork", `{}`, 409, "resume it first"},
		{"POST", "/v2/sandboxes/ID/connect", `{"timeout":0}`, 400, "want 1 to"},
		{"POST", "/v2/sandboxes/ID/connect", `{"memory":false}`, 501, "memory was kept"},
		{"POST", "/v2/sandboxes/ID/connect", ``, 201, `"envdAccessToken":"`},
		{"POST", "/v2/sandboxes/ID/connect", ``, 200, `"sandboxID":"ID"`},
		{"POST", "/sandboxes/ID/pause", `{"memory":false}`, 204, ""},
		{"POST", "/sandboxes/ID/resume", `{"timeout":60,"memory":false,"autoPause":true}`, 201, `"sandboxID":"ID"`},
		{"GET", "/sandboxes/ID", "", 200, `"lifecycle":{"onTimeout":"pause","autoResume":false}`},
		{"POST", "/sandboxes/ID/resume", ``, 409, "is running"},
		{"DELETE", "/templates/snap:v1", "", 204, ""},
		{"DELETE", "/templates/snap%3Av1", "", 404, ""},
		{"PUT", "/sandboxes/ID/network", `{}`, 501, "network"},
		{"POST", "/v3/templates", "{}", 400, "name is missing"},
		{"POST", "/v3/templates", `{"name":"mine:v1","tags":["v2"],"cpuCount":1,"memoryMB":256,"minFreeDiskMb":100}`, 202, `"tags":["v1","v2"]`},
		{"POST", "/v2/templates", `{"alias":"mine"}`, 202, `"names":["mine"],"aliases":["mine"],"tags":["default"]`},
		{"POST", "/v3/templates", `{"name":"mine","cpuCount":0}`, 400, "cpuCount 0"},
		{"POST", "/v3/templates", `{"name":"mine","memoryMB":129}`, 400, "memoryMB 129: want an even number from 128"},
		{"POST", "/v3/templates", `{"name":"mine","memoryMB":64}`, 400, "memoryMB 64"},
		{"POST", "/v3/templates", `{"name":"mine","minFreeDiskMb":-1}`, 400, "minFreeDiskMb -1"},
		{"POST", "/v3/templates", `{"name":"a b"}`, 400, "template name"},
		{"POST", "/v3/templates", `{"name":"mine","tags":["-"]}`, 400, "tag"},
		{"POST", "/templates", `{"dockerfile":""}`, 501, "that the client pushes"},
		{"GET", "/templates/base/files/abc", "", 201, `"present":false,"url":"http://example.com/uploads/abc?expires=`},
		{"GET", "/templates/base/files/a_b", "", 400, "file hash"},
		{"GET", "/templates/nope/files/abc", "", 404, ""},
		{"PUT", "/uploads/abc?expires=99999999999&signature=00", "x", 403, "signature"},
		{"POST", "/v2/templates/base/builds/abc", `{}`, 400, "want one of the two"},
		{"POST", "/v2/templates/base/builds/abc", `{"fromImage":"a"}`, 404, `build \"abc\"`},
		{"POST", "/v2/templates/base/builds/abc", `{"fromImage":"a","steps":[{"type":"HOP","args":[]}]}`, 501, "step 1"},
		{"POST", "/v2/templates/base/builds/abc", `{"fromImage":"a","steps":[{"type":"RUN"}]}`, 400, "step 1: RUN with 0 arguments"},
		{"POST", "/v2/templates/base/builds/abc", `{"fromImage":"a","fromImageRegistry":{"type":"aws"}}`, 501, "get-login-password"},
		{"POST", "/v2/templates/base/builds/abc", `{"fromImage":"a","fromImageRegistry":{"type":"registry"}}`, 400, "username"},
		{"GET", "/templates/base/builds/abc/status", "", 404, "build"},
		{"GET", "/templates/base/builds/abc/status?logsOffset=-1", "", 400, "logsOffset"},
		{"GET", "/templates/base/builds/abc/status?limit=101", "", 400, "limit"},
		{"GET", "/templates/base/builds/BUILD/status?logsOffset=7", "", 200, `"status":"ready","logEntries":[],"logs":[]`},
		{"GET", "/templates/base/builds/BUILD/logs?direction=backward&level=info", "", 200, `{"logs":[]}`},
		{"POST", "/templates/tags", "{}", 400, "target is missing"},
		{"POST", "/templates/tags", `{"target":"base:default","tags":["v1"]}`, 201, `"tags":["v1"]`},
		{"POST", "/templates/tags", `{"target":"base:v7","tags":["v1"]}`, 404, "its tags are default, v1"},
		{"DELETE", "/templates/tags", "{}", 400, "name is missing"},
		{"DELETE", "/templates/tags", `{"name":"base","tags":["v1"]}`, 204, ""},
		{"DELETE", "/templates/tags", `{"name":"base","tags":["default"]}`, 400, "cannot be removed"},
		{"PATCH", "/v2/templates/base", `{"public":true}`, 200, `{"names":["base"]}`},
		{"PATCH", "/templates/base", `{"public":false}`, 200, ""},
		{"PATCH", "/templates/nope", `{"public":false}`, 404, ""},
		{"DELETE", "/templates/mine:v3", "", 404, ""},
		{"DELETE", "/templates/mine", "", 204, ""},
		{"GET", "/volumes", "", 501, ""},
		{"POST", "/volumes", "{}", 501, ""},
		{"GET", "/secrets", "", 501, ""},
		{"POST", "/secrets/a", "{}", 501, ""},

		{"GET", "/nothing", "", 404, "there is no operation GET /nothing"},
		{"PUT", "/sandboxes/ID", "", 405, "DELETE, GET, HEAD"},
		{"OPTIONS", "/sandboxes", "", 204, ""},

		{"GET", "/v1/openapi.json", "", 200, `"openapi": "3.1.0"`},
		{"GET", "/v1/status", "", 200, `"ready":true`},
		{"GET", "/v1/nodes", "", 200, `"name":"node-aaaaaa"`},
		{"GET", "/v1/nodes/aaaaaa", "", 200, `"engines":["gvisor"]`},
		{"GET", "/v1/nodes/node-aaaaaa", "", 200, ""},
		{"GET", "/v1/nodes/nope", "", 404, ""},
		{"GET", "/v1/sandboxes", "", 200, `"id":"ID"`},
		{"GET", "/v1/sandboxes?state=failed,lost&limit=1000&metadata=a=b&metadata=c=d", "", 200, "[]"},
		{"GET", "/v1/sandboxes?state=odd", "", 400, "state"},
		{"GET", "/v1/sandboxes?metadata=a", "", 400, "want key=value"},
		{"GET", "/v1/sandboxes?limit=1001", "", 400, "limit"},
		{"GET", "/v1/sandboxes?next=nope", "", 400, "next token"},
		{"POST", "/v1/sandboxes", ``, 201, `"access_token":"`},
		{"POST", "/v1/sandboxes", `{"template":"base","timeout_seconds":-1,"resources":{"memory_bytes":1073741824}}`, 201, `"memory_bytes":1073741824`},
		{"POST", "/v1/sandboxes", `{"timeout_seconds":-2}`, 400, "-1 for never"},
		{"POST", "/v1/sandboxes", `{"timeout_seconds":86401}`, 400, "86400"},
		{"POST", "/v1/sandboxes", `{"resources":{"memory_bytes":1}}`, 400, "at least"},
		{"POST", "/v1/sandboxes", `{"template":"nope"}`, 404, ""},
		{"GET", "/v1/sandboxes/ID", "", 200, `"access_token":"`},
		{"GET", "/v1/sandboxes/" + absent, "", 404, ""},
		{"POST", "/v1/sandboxes/ID/timeout", `{"timeout_seconds":-1}`, 200, `"id":"ID"`},
		{"POST", "/v1/sandboxes/ID/timeout", `{"timeout_seconds":60,"extend_only":true}`, 200, ""},
		{"POST", "/v1/sandboxes/ID/timeout", `{}`, 400, "timeout_seconds is missing"},
		{"POST", "/v1/sandboxes", `{"auto_pause":true,"auto_pause_kind":"files"}`, 201, `"auto_pause_kind":"files"`},
		{"POST", "/v1/sandboxes", `{"auto_pause":true,"auto_pause_kind":"disk"}`, 400, "want memory or files"},
		{"POST", "/v1/sandboxes/ID/snapshots", `{"name":"team/own","kind":"files"}`, 201, `"kind":"files"`},
		{"POST", "/v1/sandboxes/ID/snapshots", `{"kind":"disk"}`, 400, "want memory or files"},
		{"GET", "/v1/snapshots?sandbox=ID&name=team/own&limit=1000", "", 200, `"sandbox_id":"ID"`},
		{"GET", "/v1/snapshots?next=nope", "", 400, "next token"},
		{"POST", "/v1/sandboxes/ID/rollback", `{"snapshot":"team/own"}`, 200, `"state":"running"`},
		{"POST", "/v1/sandboxes/ID/rollback", `{"snapshot":"base"}`, 409, "no snapshot of sandbox"},
		{"POST", "/v1/sandboxes/ID/rollback", `{}`, 400, "snapshot is missing"},
		{"POST", "/v1/sandboxes/ID/fork", `{"count":2,"timeout_seconds":-1}`, 201, `"access_token":"`},
		{"POST", "/v1/sandboxes/ID/fork", `{"count":-1}`, 400, "count -1"},
		{"POST", "/v1/sandboxes/ID/pause", `{"kind":"files"}`, 200, `"paused_kind":"files"`},
		{"POST", "/v1/sandboxes/ID/pause", ``, 409, "already"},
		{"POST", "/v1/sandboxes/ID/timeout", `{"timeout_seconds":60}`, 409, "is paused"},
		{"POST", "/v1/sandboxes/ID/resume", `{"timeout_seconds":-1,"cold":true}`, 200, `"state":"running"`},
		{"POST", "/v1/sandboxes/ID/resume", ``, 200, `"id":"ID"`},
		{"POST", "/v1/sandboxes/" + absent + "/resume", ``, 404, ""},
		{"DELETE", "/v1/snapshots/team%2Fown", "", 204, ""},
		{"DELETE", "/v1/snapshots/team%2Fown:default", "", 404, ""},
		{"DELETE", "/v1/snapshots/base", "", 404, `snapshot \"base\" does not exist`},

		{"GET", "/v1/sandboxes/ID/logs?start=2020-01-01T00:00:00Z&limit=2", "", 200, `"level":"debug"`},
		{"GET", "/v1/sandboxes/ID/logs?start=now", "", 400, "start"},
		{"GET", "/v1/sandboxes/ID/metrics", "", 200, `"cpu_used_percent":12.5`},
		{"GET", "/v1/templates", "", 200, `"names":["base"]`},
		{"GET", "/v1/templates/base", "", 200, ""},
		{"GET", "/v1/templates/nope", "", 404, ""},
		{"POST", "/v1/templates", `{"name":"tools","sources":["debian:bookworm"]}`, 202, `"build_id":"`},
		{"POST", "/v1/templates", `{"name":"tools"}`, 400, "0 sources"},
		{"POST", "/v1/templates", `{"name":"t:v1","sources":["a"]}`, 202, ""},
		{"DELETE", "/v1/templates/nope", "", 404, ""},
		{"GET", "/v1/builds/nope", "", 404, ""},
		{"GET", "/v1/builds/nope?wait=61", "", 400, "wait"},
		{"GET", "/v1/keys", "", 200, `"id":"key1"`},
		{"POST", "/v1/keys", `{"name":"ci"}`, 201, `"key":"e2b_`},
		{"POST", "/v1/keys", `{}`, 400, "key name"},
		{"DELETE", "/v1/keys/key2", "", 204, ""},
		{"DELETE", "/v1/keys/key2", "", 404, ""},
		{"GET", "/v1/events?limit=5", "", 200, `"type":"key_revoked"`},
		{"GET", "/v1/events?sandbox=A!", "", 400, "sandbox id"},
		{"GET", "/v1/events?since=2020-01-01T00:00:00Z&after=1&type=node_registered", "", 200, "[]"},

		{"DELETE", "/v1/sandboxes/" + absent, "", 404, ""},
		{"DELETE", "/sandboxes/ID", "", 204, ""},
		{"DELETE", "/sandboxes/ID", "", 404, "is gone"},
		{"GET", "/sandboxes/ID", "", 404, "is gone"},
		{"POST", "/v2/sandboxes/ID/connect", "", 404, "is gone"},
	}
	_, c := newCaller(t)
	id := c.create(t, `{"templateID":"base"}`)
	for _, tt := range tests {
		target := strings.NewReplacer("sandboxID", "sandboxID", "ID", id, "BUILD", apitest.BaseBuild).Replace(tt.target)
		t.Run(tt.method+" "+tt.target+" "+tt.body, func(t *testing.T) {
			w := c.do(tt.method, target, tt.body)
			want := strings.ReplaceAll(tt.want, `"ID`, `"`+id)
			if w.Code != tt.status || !strings.Contains(w.Body.String(), want) {
				t.Fatalf("%d %s\nwant %d with %s", w.Code, w.Body, tt.status, want)
			}
			checkForm(t, w)
		})
	}
}

// checkForm checks what holds for every answer.
func checkForm(t *testing.T, w *httptest.ResponseRecorder) {
	t.Helper()
	if w.Header().Get("X-Request-Id") == "" {
		t.Error("no request id")
	}
	switch {
	case w.Code == http.StatusNoContent:
		if w.Body.Len() > 0 {
			t.Errorf("204 with %q", w.Body)
		}
	case w.Header().Get("Content-Length") == "":
		t.Error("no length: the answer would be chunked")
	case w.Code >= 400:
		f := decode[failure](t, w)
		if f.Code != w.Code || f.Message == "" {
			t.Errorf("status %d with %+v", w.Code, f)
		}
	}
}
