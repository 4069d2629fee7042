package agent

// Nudge has the node tell its servers at once what they do not know, for when one is reached again.
func (a *Agent) Nudge() {
	for _, r := range a.servers {
		signal(r.news)
	}
}
