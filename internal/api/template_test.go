package api_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
)

// TestTemplateBuild goes the way of the SDK: ask for a build, upload what it copies, start it, and poll until its log ends.
func TestTemplateBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster, c := newCaller(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- cluster.Control.Run(ctx) }()
		defer func() { cancel(); <-done }()

		asked := decode[struct{ TemplateID, BuildID string }](t, c.do("POST", "/v3/templates", `{"name":"mine:v1","memoryMB":256}`))
		link := decode[struct{ URL string }](t, c.do("GET", "/templates/"+asked.TemplateID+"/files/abc", ""))
		open := &caller{handler: c.handler} // the link is all that an upload needs
		if w := open.do("PUT", strings.TrimPrefix(link.URL, "http://example.com"), "archive"); w.Code != 200 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		build := "/templates/" + asked.TemplateID + "/builds/" + asked.BuildID
		w := c.do("POST", "/v2"+build, `{"fromImage":"debian:bookworm","steps":[{"type":"COPY","args":["a","/b","",""],"filesHash":"abc","extra":1}]}`)
		if w.Code != 202 || w.Header().Get("Content-Length") != "0" || w.Body.Len() != 0 {
			t.Fatalf("%d %v %q", w.Code, w.Header(), w.Body)
		}
		synctest.Wait()
		if got := cluster.Node.Asked()[0].GetSources(); fmt.Sprint(got) != "[docker://debian:bookworm debian:bookworm]" {
			t.Errorf("sources %v", got)
		}
		for i := range 150 {
			cluster.Node.Say(asked.BuildID, fmt.Sprint("line ", i))
		}
		cluster.Node.FinishBuild(asked.BuildID, "", "exit code 1")
		lines := poll(t, c, build)
		if lines != 152 {
			t.Errorf("%d lines", lines)
		}
		// A node that forgot the build leaves its end, and a log that is at its end.
		<-time.After(time.Second)
		cluster.Node.ForgetBuilds()
		if w := c.do("GET", build+"/status?logsOffset=152", ""); !strings.Contains(w.Body.String(), `"status":"error","logEntries":[],"logs":[],"reason":{"message":"exit code 1"`) {
			t.Errorf("%s", w.Body)
		}
	})
}

// poll follows a build as the SDK does, and returns how many lines of log it saw.
func poll(t *testing.T, c *caller, build string) int {
	t.Helper()
	for lines := 0; ; {
		got := decode[struct {
			Status     string
			LogEntries []struct{ Timestamp, Level, Message string }
		}](t, c.do("GET", fmt.Sprintf("%s/status?logsOffset=%d", build, lines), ""))
		lines += len(got.LogEntries)
		if len(got.LogEntries) > 100 {
			t.Fatalf("%d lines at once", len(got.LogEntries))
		}
		if got.Status == "error" && len(got.LogEntries) == 0 {
			return lines
		}
	}
}

func FuzzBuildStatus(f *testing.F) {
	f.Add("0", "100", "info")
	f.Add("2147483647", "0", "")
	f.Add("-1", "1e3", "loud")
	cluster := apitest.NewCluster(f, nil)
	c := &caller{handler: cluster.Handler(), key: cluster.Key(f)}
	f.Fuzz(func(t *testing.T, offset, limit, level string) {
		q := strings.NewReplacer("%", "%25", "&", "%26", "#", "%23", " ", "+", "+", "%2B")
		for _, r := range offset + limit + level {
			if r <= ' ' || r > '~' {
				return
			}
		}
		w := c.do("GET", "/templates/base/builds/"+apitest.BaseBuild+"/status?logsOffset="+q.Replace(offset)+"&limit="+q.Replace(limit)+"&level="+q.Replace(level), "")
		if w.Code != 200 && w.Code != 400 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	})
}
