-- The TBSCertificates of intents, apart from their rows: each is needed until its outcome exists, the row for years.

-- +goose NO TRANSACTION
-- +goose Up

-- By day of the intent's created, in UTC, so that what is no longer needed goes by dropping partitions, without a DELETE. CA nodes make
-- partitions ahead. The last one takes what no other does: without it an INSERT would fail, and an INSERT IGNORE lose the row in silence.
-- Down loses the TBSCertificates of open intents.
CREATE TABLE IF NOT EXISTS intent_tbs (
  issuer VARBINARY(40) NOT NULL,
  serial VARBINARY(20) NOT NULL,
  day    DATE          NOT NULL,
  tbs    BLOB          NOT NULL,                 -- DER TBSCertificate
  PRIMARY KEY (issuer, serial, day)
) ENGINE=InnoDB DEFAULT CHARSET=binary
  PARTITION BY RANGE COLUMNS (day) (PARTITION later VALUES LESS THAN (MAXVALUE));

-- Incarnations that look for the TBSCertificate here. While any other one may live, it is written into the intent's row as before.
CREATE TABLE IF NOT EXISTS intent_tbs_reader (
  incarnation BINARY(16) NOT NULL,
  PRIMARY KEY (incarnation)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- Whose turn it was to make and drop partitions, and what was to be done: a chain.
CREATE TABLE IF NOT EXISTS intent_tbs_turn (
  n       BIGINT UNSIGNED NOT NULL,
  node    VARBINARY(64)   NOT NULL,
  work    BLOB            NOT NULL,              -- JSON: partitions to make, partitions to drop
  created DATETIME(6)     NOT NULL,
  PRIMARY KEY (n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- +goose Down
DROP TABLE IF EXISTS intent_tbs_turn, intent_tbs_reader, intent_tbs;
