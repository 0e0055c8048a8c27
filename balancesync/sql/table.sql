-- What the catalogs know about a target table.

-- name: relation
SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind,
       row_security_active(c.oid) AS hidden_rows,
       c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) AS has_children,
       has_table_privilege(c.oid, 'DELETE') AS may_delete, current_user AS role
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass($1);

-- name: in_own_schema
-- Whether the schema $1, our own, has a table of that name with all these columns: a target by mistake.
SELECT EXISTS (
    SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p') AND cardinality($3::text[]) = (
        SELECT count(*) FROM pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attname = ANY ($3::text[]) AND NOT a.attisdropped));

-- name: schema_for_new
-- The first of the search path but $1, our own.
SELECT name FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (name, place)
WHERE name <> $1 ORDER BY place LIMIT 1;

-- name: is_published
SELECT NOT pg_is_in_recovery() AND EXISTS (SELECT FROM pg_publication WHERE pubupdate OR pubdelete);

-- name: may_look_into
-- A name in a schema that the role may not use is an error, and none that isn't there.
SELECT coalesce(has_schema_privilege(to_regnamespace($1), 'USAGE'), true);

-- name: is_there
SELECT EXISTS (SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2);

-- name: hidden
-- $2 is the table's schema, if it is given.
SELECT n.nspname AS schema, current_user AS role
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relname = $1 AND NOT has_schema_privilege(n.oid, 'USAGE')
    AND n.nspname = ANY (CASE WHEN $2::text IS NOT NULL THEN ARRAY[$2::text] ELSE
        regexp_split_to_array(translate(current_setting('search_path'), '"', ''), ', *') END)
LIMIT 1;

-- name: columns
SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
       a.atthasdef OR a.attidentity <> '' AS filled, a.attgenerated <> '' OR a.attidentity = 'a' AS generated,
       coalesce(l.collisdeterministic, true) AS deterministic,
       CASE WHEN l.oid IS NOT NULL THEN quote_ident(ln.nspname) || '.' || quote_ident(l.collname) END
           AS collation,
       has_column_privilege($1::oid, a.attnum, 'SELECT') AS may_select,
       has_column_privilege($1::oid, a.attnum, 'INSERT') AS may_insert,
       has_column_privilege($1::oid, a.attnum, 'UPDATE') AS may_update
FROM pg_attribute AS a
LEFT JOIN pg_collation AS l ON l.oid = a.attcollation
LEFT JOIN pg_namespace AS ln ON ln.oid = l.collnamespace
WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum;

-- name: unique_indexes
-- Under the columns' own collations: another one may hold different keys for equal.
SELECT (SELECT array_agg(a.attname::text)
        FROM unnest(i.indkey[0:i.indnkeyatts - 1]) AS k (attnum)
        LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum) AS columns
FROM pg_index AS i
WHERE i.indrelid = $1::oid AND i.indisunique AND i.indisvalid AND i.indimmediate
      AND i.indpred IS NULL AND i.indexprs IS NULL
      AND NOT EXISTS (
          SELECT FROM unnest(i.indkey[0:i.indnkeyatts - 1], i.indcollation[0:i.indnkeyatts - 1])
              AS k (attnum, under)
          JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
          WHERE a.attcollation <> k.under);

-- name: hooks
-- Rules, and triggers, of partitions too, that may see to it that a row isn't written, or otherwise.
SELECT DISTINCT 'trigger' AS kind, t.tgname AS name, t.tgtype & 3 = 3 AS before_row,
    md5(pg_get_triggerdef(t.oid) || p.prosrc) AS digest
FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
WHERE (t.tgrelid = $1::oid OR t.tgrelid IN (SELECT relid FROM pg_partition_tree($1::oid::regclass)))
    AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 28 <> 0
UNION ALL
SELECT 'rule', r.rulename, false, md5(pg_get_ruledef(r.oid))
FROM pg_rewrite AS r
WHERE r.ev_class = $1::oid AND r.ev_type IN ('2', '3', '4') AND r.ev_enabled <> 'D'
ORDER BY kind, name, digest;
