package custody

// Mul and Inverse are the field's operations.
var (
	Mul     = mul
	Inverse = inverse
)

// Alter is the share with one bit of its secret part changed, and a checksum that fits.
func (s Share) Alter() Share {
	y := append([]byte(nil), s.y...)
	y[0] ^= 1
	s.y = y
	return s
}
