package db

import "slices"

// Tables are those that grants know of.
var Tables = all

// MayAdd tells whether a role's account may insert into a table.
func MayAdd(role, table string) bool { return slices.Contains(rights[role].add, table) }
