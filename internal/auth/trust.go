package auth

import "strings"

// TrustInstructions returns, for people, how to make clients trust the authority whose certificate is at caPath.
func TrustInstructions(caPath string) string {
	const text = `Clients must trust this cluster's certificate authority once:

  Debian, Ubuntu     sudo cp {ca} /usr/local/share/ca-certificates/cloister.crt && sudo update-ca-certificates
  Fedora, RHEL       sudo cp {ca} /etc/pki/ca-trust/source/anchors/cloister.pem && sudo update-ca-trust
  macOS              sudo security add-trusted-cert -d -r trustRoot -k /Library/Keychains/System.keychain {ca}
  Node.js (E2B SDK)  export NODE_EXTRA_CA_CERTS={ca}
  Python (E2B SDK)   export SSL_CERT_FILE={ca}
  Command line       curl --cacert {ca} ...

Node.js and Python look at their own lists, not at the system's: set their variable on every client. SSL_CERT_FILE replaces
Python's list; to keep the public authorities too, append the certificate to a copy of that list and name the copy.
Copy only the certificate to clients. Its key, ca-key.pem, stays where it is: who has it can pose as any server to them.
`
	return strings.ReplaceAll(text, "{ca}", quote(caPath))
}

// quote makes a path one word of a shell.
func quote(path string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-"
	if path != "" && strings.Trim(path, plain) == "" {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}
