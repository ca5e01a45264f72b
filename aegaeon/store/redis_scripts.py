"""The Lua that runs inside Redis: each script is one atomic update of the table or a mailbox.

Table: hash `instance:<id>` {incarnation, lease_ms, record, status}, expiring with its lease; set
`instances` of ids; `fence:<id>`, the incarnation up to which none is entered any more, for as long
as a mailbox of one would last. Mailbox: hash `mailbox:<address>` {generation, capacity, held} names
the present generation; the stream `mailbox:<address>:<generation>` holds its records, each with its
writer and number, the hash `...:writers` each writer's last number, the stream `...:bell` at most
one wake-up. What a dead reader leaves expires; a living one puts that off each second that it
receives.

Where the server has no memory left, a script may write on once it has begun to, so each that must
not fail then, for a lease or to make room, begins with what takes none.
"""

ABANDONED_MS = 3_600_000  # far over the longest time that a reader is busy with something else

# KEYS: instance, instances, fence. ARGV: id, incarnation, lease_ms, record, status. 0: stale, or
# removed before.
REGISTER = """
local incarnation = redis.call('HGET', KEYS[1], 'incarnation')
if incarnation and tonumber(incarnation) > tonumber(ARGV[2]) then return 0 end
local fence = redis.call('GET', KEYS[3])
if fence and tonumber(fence) >= tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'incarnation', ARGV[2], 'lease_ms', ARGV[3],
           'record', ARGV[4], 'status', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[1])
return 1
"""

# KEYS: instance. ARGV: incarnation, status. 0: a newer incarnation; -1: no entry, or an older
# one's, as where a server has forgotten the last things.
UPDATE = """
local entry = redis.call('HMGET', KEYS[1], 'incarnation', 'lease_ms')
if not entry[1] then return -1 end
if entry[1] ~= ARGV[1] then return tonumber(entry[1]) < tonumber(ARGV[1]) and -1 or 0 end
redis.call('PEXPIRE', KEYS[1], entry[2])
redis.call('HSET', KEYS[1], 'status', ARGV[2])
return 1
"""

# KEYS: instance, instances, fence. ARGV: id, incarnation, ABANDONED_MS. Also where there is no
# entry: who is cut off may not enter itself again once others have its requests.
REMOVE = """
local fence = redis.call('GET', KEYS[3])
redis.call('DEL', KEYS[3])
local last = ARGV[2]
if fence and tonumber(fence) > tonumber(last) then last = fence end
redis.call('SET', KEYS[3], last, 'PX', ARGV[3])
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
return 1
"""

# KEYS: instances. ARGV: prefix of the instances' keys. Returns record, status, milliseconds left of
# the lease, record, ...
SYNC = """
local rows = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local entry = redis.call('HMGET', ARGV[1] .. id, 'record', 'status')
  if entry[1] then
    rows[#rows + 1] = entry[1]
    rows[#rows + 1] = entry[2]
    rows[#rows + 1] = redis.call('PTTL', ARGV[1] .. id)
  else
    redis.call('SREM', KEYS[1], id)
  end
end
return rows
"""

# KEYS: mailbox. ARGV: generation, capacity, ABANDONED_MS. Drops the generation before.
CREATE = """
local before = redis.call('HGET', KEYS[1], 'generation')
if before then
  local stream = KEYS[1] .. ':' .. before
  redis.call('DEL', stream, stream .. ':writers', stream .. ':bell')
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'generation', ARGV[1], 'capacity', ARGV[2], 'held', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

# KEYS: mailbox, stream, writers. ARGV: generation, writer, sequence, cost, record, sequence of the
# writer's record before. 1: committed, now or at an earlier try; 0: full; -1: closed; {last}: the
# record before is not here, but only those up to `last`.
SEND = """
local box = redis.call('HMGET', KEYS[1], 'generation', 'capacity', 'held')
if box[1] ~= ARGV[1] then return -1 end
local last = tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or 0)
if tonumber(ARGV[3]) <= last then return 1 end
if last < tonumber(ARGV[6]) then return {last} end
if tonumber(box[3]) + tonumber(ARGV[4]) > tonumber(box[2]) then return 0 end
redis.call('XADD', KEYS[2], '*', 'r', ARGV[5], 'w', ARGV[2], 's', ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[1], 'held', ARGV[4])
return 1
"""

# KEYS: mailbox, stream, writers, bell. -1: closed.
# ARGV: generation, last entry that arrived, overhead, ABANDONED_MS.
ACKNOWLEDGE = """
if redis.call('HGET', KEYS[1], 'generation') ~= ARGV[1] then return -1 end
local freed = 0
while true do
  local entries = redis.call('XRANGE', KEYS[2], '-', ARGV[2], 'COUNT', 500)
  if #entries == 0 then break end
  local ids = {}
  for i, entry in ipairs(entries) do
    ids[i] = entry[1]
    freed = freed + #entry[2][2] + tonumber(ARGV[3])
  end
  redis.call('XDEL', KEYS[2], unpack(ids))
end
if freed > 0 then redis.call('HINCRBY', KEYS[1], 'held', -freed) end
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[4]) end
return 1
"""

# KEYS: mailbox, stream, writers, bell. ARGV: generation. Leaves a successor's alone.
DROP = """
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
if redis.call('HGET', KEYS[1], 'generation') == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""
