-- What a run does to a target table. k1.. are the key columns, v1.. the value columns, o1.. the
-- values that the row had before; ctid in a table that only COPY fills is the order of reading.

-- name: create_rejects
CREATE TEMP TABLE pg_temp.staged_rejects
    (mapping text NOT NULL, key bytea NOT NULL, value bytea, reason text NOT NULL, detail text NOT NULL);

-- name: create
CREATE TEMP TABLE {staging} ({key_types}, {value_types}, rejected boolean);
CREATE TEMP TABLE {diff} (n bigint NOT NULL, op "char" NOT NULL, {key_types}, {value_types}, {old_types});

-- name: count_keys
SELECT {count_keys} FROM {staging};

-- name: drop_earlier
WITH last AS (
    SELECT DISTINCT ON ({keys}) {keys}, ctid AS place, rejected
    FROM {staging} ORDER BY {keys}, ctid DESC
), dropped AS (
    DELETE FROM {staging} AS earlier USING last
    WHERE {earlier_is_last} AND earlier.ctid <> last.place
    RETURNING earlier.rejected AS was_rejected, last.rejected AS is_rejected, {last_keys}
)
SELECT DISTINCT {key_texts} FROM dropped WHERE was_rejected AND is_rejected IS NULL;

-- name: withdraw_rejects
DELETE FROM pg_temp.staged_rejects WHERE mapping = $1 AND key = ANY($2::bytea[]);

-- name: count_rejects
SELECT count(DISTINCT key) FROM pg_temp.staged_rejects WHERE mapping = $1;

-- name: count_staged
SELECT count(*) FROM {staging} WHERE rejected IS NULL;

-- name: count_target
SELECT count(*) FROM {target} AS t WHERE {keys_not_null};

-- name: count_rejected_rows
SELECT count(*) FROM {staging} AS s WHERE s.rejected AND EXISTS (SELECT FROM {target} AS t WHERE {same_key});

-- name: diff_join
INSERT INTO {diff} (n, op, {keys}, {values}, {olds})
SELECT row_number() OVER (ORDER BY {keys}), op, {keys}, {values}, {olds}
FROM (
    SELECT CASE WHEN {no_row} THEN 'i'::"char" ELSE 'u'::"char" END AS op, {s_keys}, {s_values}, {t_values_as_olds}
    FROM {staged} AS s LEFT JOIN {target} AS t ON {same_key}
    WHERE s.rejected IS NULL AND ({no_row} OR {differs})
) AS d;

-- name: diff_new
INSERT INTO {diff} (n, op, {keys}, {values})
SELECT row_number() OVER (ORDER BY {keys}), 'i', {keys}, {values}
FROM {staging} WHERE rejected IS NULL;

-- name: diff_gone
INSERT INTO {diff} (n, op, {keys}, {olds})
SELECT $1 + row_number() OVER (ORDER BY {t_keys}), 'd', {t_keys}, {t_values}
FROM {target} AS t
WHERE t.{synced_at} IS NOT NULL AND NOT EXISTS (SELECT FROM {staging} AS s WHERE {same_key});

-- name: diff_gone_again
INSERT INTO {diff} (n, op, {keys}, {olds})
SELECT $1 + row_number() OVER (ORDER BY s.n), 'd', {t_keys}, {t_values}
FROM {first} AS s JOIN {target} AS t ON {same_key} WHERE s.op = 'd';

-- name: summary
SELECT op::text AS op, count(*) AS rows, min(n) - 1 AS after, max(n) AS last FROM {diff} GROUP BY op;

-- name: totals
SELECT {totals} FROM {diff} WHERE op = ANY($1::"char"[]);

-- name: index_diff
CREATE INDEX ON {diff} (n);

-- name: page
SELECT n, op::text AS op, {key_texts} FROM {diff} WHERE n > $1 AND op = $3::"char" ORDER BY n LIMIT $2;

-- name: sample
SELECT op::text AS op, {key_texts}, {value_texts}, {old_texts}
FROM {diff} WHERE op = $1::"char" ORDER BY n LIMIT $2;

-- name: row
SELECT {key_texts}, {raw_texts} FROM {diff} WHERE op = $1::"char" AND n > $2 ORDER BY n LIMIT 1;

-- name: forget
DELETE FROM {diff} WHERE n = ANY($1::bigint[]);

-- name: empty_staging
DELETE FROM {staging};

-- name: empty_diff
DELETE FROM {diff};

-- name: vacuum
VACUUM {staging}, {diff};

-- name: insert
INSERT INTO {target} ({columns}{comma_synced_at})
SELECT {keys}, {values}{comma_now} FROM {diff} WHERE n > $1 AND n <= $2 AND op = 'i' ORDER BY n;

-- name: insert_on_conflict
INSERT INTO {target} AS t ({columns}{comma_synced_at})
SELECT {keys}, {values}{comma_now} FROM {diff} WHERE n > $1 AND n <= $2 AND op = 'i' ORDER BY n
ON CONFLICT ({key_columns}) DO UPDATE SET {set_excluded} WHERE {excluded_differs};

-- name: update
UPDATE {target} AS t SET {set_values}
FROM (SELECT * FROM {diff} WHERE n > $1 AND n <= $2 AND op = 'u' ORDER BY n) AS s
WHERE {same_key};

-- name: delete
DELETE FROM {target} AS t
USING (SELECT * FROM {diff} WHERE n > $1 AND n <= $2 AND op = 'd' ORDER BY n) AS s
WHERE {same_key} AND t.{synced_at} IS NOT NULL;
