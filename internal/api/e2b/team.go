package e2b

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/auth"
)

// listTeams answers with the one team that there is. Its key is the caller's own: no other can be shown, because keys
// are kept hashed.
func listTeams(w http.ResponseWriter, r *http.Request) error {
	type team struct {
		TeamID    string `json:"teamID"`
		Name      string `json:"name"`
		APIKey    string `json:"apiKey"`
		IsDefault bool   `json:"isDefault"`
	}
	key, err := auth.FromRequest(r.Header)
	if err != nil {
		key = "" // who comes over the local socket shows none
	}
	return exchange.JSON(w, http.StatusOK, []team{{
		TeamID: "default", Name: "default", APIKey: key, IsDefault: true,
	}})
}
