package api

import "net/http"

// maxRequestedHeaders bounds what a preflight's answer repeats.
const maxRequestedHeaders = 1024

// crossOrigin lets pages of any origin call the API, and answers OPTIONS; it reports whether it has answered. A key is
// never sent by a browser on its own, so an origin proves nothing and is not asked for.
func crossOrigin(w http.ResponseWriter, r *http.Request) bool {
	h := w.Header()
	if r.Header.Get("Origin") != "" {
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers", "X-Next-Token, X-Total-Running, X-Request-Id, Retry-After")
	}
	if r.Method != http.MethodOptions {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
	if wanted := r.Header.Get("Access-Control-Request-Headers"); wanted != "" && len(wanted) <= maxRequestedHeaders {
		h.Set("Access-Control-Allow-Headers", wanted)
	}
	h.Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
	return true
}
