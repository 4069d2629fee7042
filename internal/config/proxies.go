package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
)

// defaultLinkPort is what a listed proxy without a port means.
const defaultLinkPort = "3005"

// ProxyAddresses returns Proxies as HOST:PORT. Its errors name each that is none, and those that are one and the same.
func (c *Config) ProxyAddresses() ([]string, error) {
	var errs []error
	out, named := make([]string, 0, len(c.Proxies)), make(map[string]string, len(c.Proxies))
	for _, text := range c.Proxies {
		address, ok := proxyAddress(text)
		if !ok {
			errs = append(errs, fmt.Errorf("proxies: %.80q: want https://HOST:PORT of a proxy's link-addr, without user, path or query, such as https://192.0.2.9:3005", text))
			continue
		}
		if other, twice := named[address]; twice {
			errs = append(errs, fmt.Errorf("proxies: %.80q and %.80q are the same address: list each proxy once", other, text))
			continue
		}
		named[address] = text
		out = append(out, address)
	}
	return out, errors.Join(errs...)
}

// proxyAddress reads HOST, HOST:PORT or either after https://.
func proxyAddress(text string) (address string, ok bool) {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.User != nil || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return "", false
	}
	port := u.Port()
	if port == "" {
		port = defaultLinkPort
	}
	address = net.JoinHostPort(strings.ToLower(u.Hostname()), port)
	return address, dialable(address) && !strings.HasSuffix(u.Host, ":")
}
