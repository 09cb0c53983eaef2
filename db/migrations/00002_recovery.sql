-- Recovery rounds (protocols, section 3). A round begins with its row and ends with its row in round_end: while the
-- newest round has not ended nothing is released.

-- +goose NO TRANSACTION
-- +goose Up

ALTER TABLE round ADD COLUMN IF NOT EXISTS proved TINYINT UNSIGNED NOT NULL DEFAULT 0;  -- 1: rows are known to be lost

CREATE TABLE IF NOT EXISTS round_end (
  n       BIGINT UNSIGNED NOT NULL,
  node    VARBINARY(64)   NOT NULL,
  detail  BLOB            NOT NULL,              -- JSON: what was put back, what stayed uncovered
  created DATETIME(6)     NOT NULL,
  PRIMARY KEY (n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- What each node did in a round becomes a chain: "begun" by an incarnation of the node, then "done" by it, or "covered" by
-- another node that holds its copies. No earlier version wrote this table.
ALTER TABLE recon
  ADD COLUMN IF NOT EXISTS n           INT UNSIGNED  NOT NULL DEFAULT 1 AFTER node,
  ADD COLUMN IF NOT EXISTS event       VARBINARY(16) NOT NULL DEFAULT '' AFTER n,
  ADD COLUMN IF NOT EXISTS incarnation VARBINARY(16) NOT NULL DEFAULT '' AFTER event,  -- of the node; empty when covered
  ADD COLUMN IF NOT EXISTS witness     VARBINARY(64) NOT NULL DEFAULT '' AFTER incarnation,  -- who wrote the row
  ADD COLUMN IF NOT EXISTS detail      BLOB          NOT NULL DEFAULT '' AFTER witness,  -- JSON
  DROP PRIMARY KEY, ADD PRIMARY KEY (round, node, n);

-- +goose Down
DROP TABLE IF EXISTS round_end;
