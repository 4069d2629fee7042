package telemetry

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
)

// scope names the spans' origin.
const scope = "github.com/cloister-dev/cloister"

// Tracing says where spans go.
type Tracing struct {
	// Endpoint is the URL of an OTLP/HTTP collector; empty switches tracing off. Without a path it gets /v1/traces.
	Endpoint string
	Version  string
}

// StartTracing sends spans to the endpoint from now on. The returned function sends what waits and stops; it must be called.
func StartTracing(ctx context.Context, t Tracing) (stop func(context.Context) error, err error) {
	if t.Endpoint == "" {
		return func(context.Context) error { return nil }, nil
	}
	u, err := url.Parse(t.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("trace endpoint %q: %w", t.Endpoint, err)
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/traces"
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(u.String()))
	if err != nil {
		return nil, fmt.Errorf("open trace exporter %s: %w", t.Endpoint, err)
	}
	provider := trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(resource.NewSchemaless(
		attribute.String("service.name", "cloister"), attribute.String("service.version", t.Version),
	)))
	otel.SetTracerProvider(provider)
	otel.SetTextMapPropagator(propagation.TraceContext{})
	return provider.Shutdown, nil
}

// Traced wraps a handler in one span a request, named by method and the pattern that name returns for it. Where tracing
// is off it costs next to nothing.
func Traced(next http.Handler, name func(*http.Request) string) http.Handler {
	tracer := otel.Tracer(scope)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := otel.GetTextMapPropagator().Extract(r.Context(), propagation.HeaderCarrier(r.Header))
		ctx, span := tracer.Start(ctx, name(r))
		defer span.End()
		if !span.IsRecording() {
			next.ServeHTTP(w, r)
			return
		}
		seen := &statusWriter{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(seen, r.WithContext(ctx))
		span.SetAttributes(attribute.String("http.request.method", r.Method), attribute.Int("http.response.status_code", seen.status))
		if seen.status >= http.StatusInternalServerError {
			span.SetStatus(codes.Error, http.StatusText(seen.status))
		}
	})
}

// SpanOf begins the span that Traced does, of a request that no handler answers: field looks its headers up, and end is told the
// answer's status, 0 where none was sent.
func SpanOf(ctx context.Context, name, method string, field func(name string) string) (spanned context.Context, end func(status int)) {
	ctx = otel.GetTextMapPropagator().Extract(ctx, fieldCarrier(field))
	ctx, span := otel.Tracer(scope).Start(ctx, name) //nolint:spancheck // end ends it
	return ctx, func(status int) {                   //nolint:spancheck // likewise
		span.SetAttributes(attribute.String("http.request.method", method))
		if status > 0 {
			span.SetAttributes(attribute.Int("http.response.status_code", status))
		}
		if status >= http.StatusInternalServerError {
			span.SetStatus(codes.Error, http.StatusText(status))
		}
		span.End()
	}
}

// fieldCarrier looks headers up for a propagator, which only reads.
type fieldCarrier func(name string) string

// Get returns a header.
func (f fieldCarrier) Get(name string) string { return f(name) }

// Set does nothing.
func (f fieldCarrier) Set(string, string) {}

// Keys returns nothing.
func (f fieldCarrier) Keys() []string { return nil }

// statusWriter remembers the status of an answer.
type statusWriter struct {
	http.ResponseWriter

	status int
}

// WriteHeader remembers the status.
func (w *statusWriter) WriteHeader(status int) {
	if status >= http.StatusOK {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController reach the writer below.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Flush serves libraries that ask the writer itself whether an answer can be streamed.
func (w *statusWriter) Flush() {
	_ = http.NewResponseController(w.ResponseWriter).Flush() // http.Flusher has no way to tell of an error
}

// Hijack serves libraries that ask the writer itself for its connection.
func (w *statusWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return http.NewResponseController(w.ResponseWriter).Hijack()
}
