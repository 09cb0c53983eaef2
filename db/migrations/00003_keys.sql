-- Keys that must not be certified, and the row's proof that a CA node wrote it.

-- +goose NO TRANSACTION
-- +goose Up

-- What became of a subject key: a chain, in which certifying it and blocking it compete for the next number. A certificate
-- whose use stands below the block was under way before; none can stand above it.
CREATE TABLE IF NOT EXISTS key_use (
  spki   BINARY(32)     NOT NULL,                -- SHA-256 of the DER SubjectPublicKeyInfo
  n      INT UNSIGNED   NOT NULL,                -- from 1
  kind   VARBINARY(8)   NOT NULL,                -- issue | block
  issuer VARBINARY(40)  NOT NULL,                -- of the intent; '' for a block
  serial VARBINARY(20)  NOT NULL,
  PRIMARY KEY (spki, n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- Why a key is blocked: written with the block's row of the chain, in one transaction.
CREATE TABLE IF NOT EXISTS blocked_key (
  spki    BINARY(32)      NOT NULL,
  n       INT UNSIGNED    NOT NULL,              -- of the block in key_use
  reason  VARBINARY(32)   NOT NULL,              -- keyCompromise | weakKey | other
  comment VARBINARY(1000) NOT NULL DEFAULT '',
  actor   VARBINARY(255)  NOT NULL,              -- principal URI
  created DATETIME(6)     NOT NULL,
  PRIMARY KEY (spki)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- Which key made the row's MAC.
ALTER TABLE intent ADD COLUMN IF NOT EXISTS mac_key BINARY(8) NULL;

-- +goose Down
ALTER TABLE intent DROP COLUMN IF EXISTS mac_key;
DROP TABLE IF EXISTS blocked_key, key_use;
