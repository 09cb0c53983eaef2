-- The record. Every table is insert-only: what changes is a chain PK(name, n), and
-- facts that exclude each other share one key. Keys are binary, so that "abc", "ABC"
-- and "abc " are three keys. An issuer is a CA generation, written "demo-g1".

-- +goose NO TRANSACTION
-- +goose Up

-- Writers and their change-log lanes. A lane has one appender and one transaction in flight.
CREATE TABLE IF NOT EXISTS writer (
  incarnation BINARY(16)     NOT NULL,
  node        VARBINARY(64)  NOT NULL,
  role        VARBINARY(32)  NOT NULL,
  started     DATETIME(6)    NOT NULL,
  PRIMARY KEY (incarnation)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS lane (
  lane        VARBINARY(96)  NOT NULL,           -- "{node}/{incarnation hex}/{index}"
  incarnation BINARY(16)     NOT NULL,
  PRIMARY KEY (lane)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- A certificate that is about to be signed. req is NULL only for rows that a restart
-- reconstructs from a journal whose intent never reached the database.
CREATE TABLE IF NOT EXISTS intent (
  issuer          VARBINARY(40)   NOT NULL,
  serial          VARBINARY(20)   NOT NULL,
  req             BINARY(32)      NULL,          -- SHA-256(principal, 0, Idempotency-Key)
  ver             INT UNSIGNED    NOT NULL DEFAULT 1,
  body            BINARY(32)      NOT NULL,      -- SHA-256 of the parsed request
  tbs             BLOB            NOT NULL,      -- DER TBSCertificate
  profile         VARBINARY(64)   NOT NULL,
  profile_version INT UNSIGNED    NOT NULL,
  profile_hash    BINARY(32)      NOT NULL,
  requester       VARBINARY(255)  NOT NULL,      -- principal URI
  reference       VARBINARY(255)  NOT NULL DEFAULT '',
  site_epoch      BIGINT UNSIGNED NOT NULL,
  node            VARBINARY(64)   NOT NULL,
  mac             BINARY(32)      NULL,
  created         DATETIME(6)     NOT NULL,
  PRIMARY KEY (issuer, serial),
  UNIQUE KEY request (req, ver),
  KEY requester (requester, issuer, serial),
  KEY created (created)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- What became of an intent: a certificate, or abandonment. Both compete for one key.
CREATE TABLE IF NOT EXISTS outcome (
  issuer     VARBINARY(40)   NOT NULL,
  serial     VARBINARY(20)   NOT NULL,
  ver        INT UNSIGNED    NOT NULL DEFAULT 1,
  kind       VARBINARY(16)   NOT NULL,           -- cert | abandoned
  der        BLOB            NULL,
  not_after  DATETIME        NULL,
  lane       VARBINARY(96)   NOT NULL,
  seq        BIGINT UNSIGNED NOT NULL,
  created    DATETIME(6)     NOT NULL,
  PRIMARY KEY (issuer, serial, ver),
  CONSTRAINT outcome_intent FOREIGN KEY (issuer, serial) REFERENCES intent (issuer, serial)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- Events of one serial; the highest n wins.
CREATE TABLE IF NOT EXISTS revocation (
  issuer          VARBINARY(40)    NOT NULL,
  serial          VARBINARY(20)    NOT NULL,
  n               INT UNSIGNED     NOT NULL,
  event           VARBINARY(16)    NOT NULL,     -- revoke | hold | release | reason-change
  reason          TINYINT UNSIGNED NOT NULL,     -- RFC 5280 CRLReason
  date            DATETIME         NOT NULL,     -- revocationDate
  invalidity_date DATETIME         NULL,
  comment         VARBINARY(1000)  NOT NULL DEFAULT '',
  actor           VARBINARY(255)   NOT NULL,
  site_epoch      BIGINT UNSIGNED  NOT NULL,
  lane            VARBINARY(96)    NOT NULL,
  seq             BIGINT UNSIGNED  NOT NULL,
  created         DATETIME(6)      NOT NULL,
  PRIMARY KEY (issuer, serial, n),
  CONSTRAINT revocation_intent FOREIGN KEY (issuer, serial) REFERENCES intent (issuer, serial)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- The change feed: a row for every fact, in the fact's own transaction.
CREATE TABLE IF NOT EXISTS feed (
  lane    VARBINARY(96)    NOT NULL,
  seq     BIGINT UNSIGNED  NOT NULL,             -- from 1, without holes
  kind    TINYINT UNSIGNED NOT NULL,             -- bit 7 set: a reader that does not know it must stop
  issuer  VARBINARY(40)    NOT NULL,
  serial  VARBINARY(20)    NOT NULL,
  payload BLOB             NOT NULL,
  chain   BINARY(32)       NOT NULL,
  PRIMARY KEY (lane, seq)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- CA generations. The row is the generation; its certificates, state and responders are chains.
CREATE TABLE IF NOT EXISTS generation (
  issuer     VARBINARY(40)  NOT NULL,            -- "{ca}-g{generation}"
  ca         VARBINARY(32)  NOT NULL,
  generation INT UNSIGNED   NOT NULL,
  parent     VARBINARY(40)  NOT NULL,            -- itself for a root
  key_group  VARBINARY(32)  NOT NULL,
  key_id     VARBINARY(32)  NOT NULL,
  spki       BLOB           NOT NULL,
  created    DATETIME(6)    NOT NULL,
  PRIMARY KEY (issuer),
  UNIQUE KEY ca_generation (ca, generation)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS generation_log (
  issuer      VARBINARY(40)  NOT NULL,
  n           INT UNSIGNED   NOT NULL,
  event       VARBINARY(16)  NOT NULL,           -- certificate | state
  state       VARBINARY(16)  NOT NULL,           -- pending | active | suspended | retired | revoked | expired | external
  cert_issuer VARBINARY(40)  NOT NULL,           -- where the certificate's outcome row is
  cert_serial VARBINARY(20)  NOT NULL,
  der         BLOB           NOT NULL,
  created     DATETIME(6)    NOT NULL,
  PRIMARY KEY (issuer, n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS responder (
  issuer      VARBINARY(40)  NOT NULL,
  n           INT UNSIGNED   NOT NULL,
  key_group   VARBINARY(32)  NOT NULL,
  key_id      VARBINARY(32)  NOT NULL,
  cert_serial VARBINARY(20)  NOT NULL,
  der         BLOB           NOT NULL,
  created     DATETIME(6)    NOT NULL,
  PRIMARY KEY (issuer, n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- A CRL that is about to be signed, and what became of it.
CREATE TABLE IF NOT EXISTS crl (
  issuer      VARBINARY(40)   NOT NULL,
  shard       INT UNSIGNED    NOT NULL,
  n           INT UNSIGNED    NOT NULL,
  number      BIGINT UNSIGNED NOT NULL,          -- site epoch * 2^48 + max(unix ms, highest known + 1)
  this_update DATETIME        NOT NULL,
  next_update DATETIME        NOT NULL,
  events      BIGINT UNSIGNED NOT NULL,          -- revocation rows of the issuer that it covers
  tbs_hash    BINARY(32)      NOT NULL,
  node        VARBINARY(64)   NOT NULL,
  site_epoch  BIGINT UNSIGNED NOT NULL,
  created     DATETIME(6)     NOT NULL,
  PRIMARY KEY (issuer, shard, n),
  UNIQUE KEY number (issuer, shard, number)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS crl_result (
  issuer  VARBINARY(40)   NOT NULL,
  shard   INT UNSIGNED    NOT NULL,
  n       INT UNSIGNED    NOT NULL,
  kind    VARBINARY(16)   NOT NULL,              -- crl | void
  der     LONGBLOB        NULL,
  lane    VARBINARY(96)   NOT NULL,
  seq     BIGINT UNSIGNED NOT NULL,
  created DATETIME(6)     NOT NULL,
  PRIMARY KEY (issuer, shard, n),
  CONSTRAINT crl_result_crl FOREIGN KEY (issuer, shard, n) REFERENCES crl (issuer, shard, n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- Chains of the cluster itself.
CREATE TABLE IF NOT EXISTS va_member (
  va          VARBINARY(64)  NOT NULL,
  n           INT UNSIGNED   NOT NULL,
  event       VARBINARY(8)   NOT NULL,           -- in | out
  policy      VARBINARY(8)   NOT NULL,           -- strict | serve
  address     VARBINARY(255) NOT NULL,           -- host:port of its mTLS listener
  incarnation BINARY(16)     NOT NULL,
  created     DATETIME(6)    NOT NULL,
  PRIMARY KEY (va, n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS site_epoch (
  n       BIGINT UNSIGNED NOT NULL,
  site    VARBINARY(64)   NOT NULL,
  created DATETIME(6)     NOT NULL,
  PRIMARY KEY (n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS group_log (
  key_group VARBINARY(32)  NOT NULL,
  n         INT UNSIGNED   NOT NULL,
  event     VARBINARY(16)  NOT NULL,             -- member | domain | pending | live | abandoned | ...
  subject   VARBINARY(64)  NOT NULL,             -- member name or key id
  payload   BLOB           NOT NULL,             -- JSON, shape by event
  actor     VARBINARY(255) NOT NULL,
  created   DATETIME(6)    NOT NULL,
  PRIMARY KEY (key_group, n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS round (
  n       BIGINT UNSIGNED NOT NULL,
  node    VARBINARY(64)   NOT NULL,
  cause   VARBINARY(255)  NOT NULL,
  created DATETIME(6)     NOT NULL,
  PRIMARY KEY (n)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS recon (
  round   BIGINT UNSIGNED NOT NULL,
  node    VARBINARY(64)   NOT NULL,
  created DATETIME(6)     NOT NULL,
  PRIMARY KEY (round, node)
) ENGINE=InnoDB DEFAULT CHARSET=binary;

-- +goose Down
DROP TABLE IF EXISTS recon, round, group_log, site_epoch, va_member, crl_result, crl, responder,
  generation_log, generation, feed, revocation, outcome, intent, lane, writer;
