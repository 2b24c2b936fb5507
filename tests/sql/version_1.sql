PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE triggers_sessions (
	sid VARCHAR(32) NOT NULL,
	uid TEXT NOT NULL,
	version VARCHAR(16) NOT NULL,
	incarnation VARCHAR(32) NOT NULL,
	head TEXT NOT NULL,
	PRIMARY KEY (sid)
);
INSERT INTO triggers_sessions VALUES('da68380de022bac727782efee3c495d4','order:42','986ff0ebe297dbbb','bfafc36008356f1d','{"format":2,"i":"bfafc36008356f1d","c":"2c210dd5de7bd954cf2f94ec6850e263","m":"default","b":1795323354648,"t":1795323354699,"n":3,"u":2}');
CREATE TABLE triggers_entries (
	sid VARCHAR(32) NOT NULL,
	eid VARCHAR(32) NOT NULL,
	name TEXT NOT NULL,
	value TEXT NOT NULL,
	PRIMARY KEY (sid, eid)
);
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','335e9ea7419040697d559ca06b309ac0','t:t_late','1,1,1');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','a77314ab85ee236082082d58d2df7f89','l:paid','1:{"amount":99}');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','c10c5f200ceb6dc278f76c2de3030ef6','e:p1','{"digest":"364671f00a5b008dcd1230f3","trigger":"paid","at":1795323354648,"lasting":true,"call":"166ab3ea89ee","due":0,"heard_by":["t_ship"],"created":["t_late#0","t_ship#0"],"released":[],"abandoned":[]}');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','fb7c4b1b2a231857dcc2e93a11960799','h:1','["paid",{"amount":99},1795323354648,"p1",null,["t_ship"]]');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','e51630cc6d09735c862b13e10c3d6da5','l:packed','1:{"box":"\u00fc"}');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','93f65d765f65c5735802622c2740af2a','h:2','["packed",{"box":"\u00fc"},1795323354669,null,null,["t_ship"]]');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','f44a7bedca87f31e837868755f064260','t:t_thank','1,1,0');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','06ed0c6a1a9f0874bacb958d4983e668','t:t_ship','1,0,0');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','a34f9b91d638232fdd8ae3dc48bf4c4c','l:t_ship','1:{"parcel":7}');
INSERT INTO triggers_entries VALUES('da68380de022bac727782efee3c495d4','25b0014c3a16a3ba44a0e7798b2b13f1','h:3','["t_ship",{"parcel":7},1795323354699,null,"t_ship#0",["t_thank"]]');
CREATE TABLE triggers_instances (
	sid VARCHAR(32) NOT NULL,
	iid VARCHAR(32) NOT NULL,
	name TEXT NOT NULL,
	rev INTEGER NOT NULL,
	status VARCHAR(16) NOT NULL,
	attempt INTEGER NOT NULL,
	token VARCHAR(64) NOT NULL,
	lease BIGINT NOT NULL,
	sends INTEGER NOT NULL,
	eta BIGINT NOT NULL,
	changed BIGINT NOT NULL,
	claimed BIGINT NOT NULL,
	loss VARCHAR(32) NOT NULL,
	spared INTEGER NOT NULL,
	task_id TEXT NOT NULL,
	body TEXT NOT NULL,
	PRIMARY KEY (sid, iid)
);
INSERT INTO triggers_instances VALUES('da68380de022bac727782efee3c495d4','65b404088cf2e2c5df5afb2c6d437b1d','t_late#0',1,'unstarted',0,'',0,0,0,1795323354648,0,'',0,'','{"kwargs":[]}');
INSERT INTO triggers_instances VALUES('da68380de022bac727782efee3c495d4','cc28fa76ee44267853938e8dff97d34d','t_ship#0',4,'finished',0,'',0,0,0,1795323354699,0,'fail',0,'a1fb9a56-d036-47a1-869b-9c2d9b12a1a8','{"kwargs":[["paid",{"amount":99}],["packed",{"box":"\u00fc"}]],"metadata":{"result":{"parcel":7}},"times":{"unstarted":1795323354648,"scheduled":1795323354669,"running":1795323354697}}');
INSERT INTO triggers_instances VALUES('da68380de022bac727782efee3c495d4','4bbea730ef1cb59a27f55a71f68844a4','t_thank#0',1,'scheduled',0,'',0,0,0,1795323354699,0,'',0,'feb5210d-0960-4f2a-a7b2-fa453eac00cc','{"kwargs":[["t_ship",{"parcel":7}]],"times":{"unstarted":1795323354699},"cascade":1}');
CREATE TABLE triggers_waiting (
	sid VARCHAR(32) NOT NULL,
	tid VARCHAR(32) NOT NULL,
	iid VARCHAR(32) NOT NULL,
	"trigger" TEXT NOT NULL,
	PRIMARY KEY (sid, tid, iid)
);
INSERT INTO triggers_waiting VALUES('da68380de022bac727782efee3c495d4','089001a35679a33ef3db0ca350db9b9a','65b404088cf2e2c5df5afb2c6d437b1d','late');
CREATE TABLE triggers_passing (
	sid VARCHAR(32) NOT NULL,
	eid VARCHAR(32) NOT NULL,
	value TEXT NOT NULL,
	until BIGINT NOT NULL,
	PRIMARY KEY (sid, eid)
);
INSERT INTO triggers_passing VALUES('da68380de022bac727782efee3c495d4','e69778810ac8c552cc8041a0815d559c','{"digest":"2ec875cdfe704e0463c2506c","trigger":"packed","at":1795323354669,"lasting":false,"call":"573324b7733d","due":0,"heard_by":["t_ship"],"created":[],"released":["t_ship#0"],"abandoned":[]}',1795323954683);
INSERT INTO triggers_passing VALUES('da68380de022bac727782efee3c495d4','200d6de69d27ec61678ced16e0a12f53','{"digest":"c3a310bc2a4f31ef2a14e578","trigger":"","at":1795323354699,"lasting":false,"call":"fbe16a542900","due":0,"heard_by":["t_thank"],"created":["t_thank#0"],"released":["t_thank#0"],"abandoned":[]}',1795323954703);
CREATE TABLE triggers_configurations (
	digest VARCHAR(32) NOT NULL,
	text TEXT NOT NULL,
	PRIMARY KEY (digest)
);
INSERT INTO triggers_configurations VALUES('2c210dd5de7bd954cf2f94ec6850e263','{"t_late":{"after":["late"],"run":"x","within":3600.0},"t_ship":{"after":["paid","packed"],"run":"shop.ship"},"t_thank":{"after":["t_ship"],"run":"shop.thank"}}');
CREATE TABLE triggers_dues (
	sid VARCHAR(32) NOT NULL,
	iid VARCHAR(32) NOT NULL,
	uid TEXT NOT NULL,
	name TEXT NOT NULL,
	at BIGINT NOT NULL,
	PRIMARY KEY (sid, iid)
);
INSERT INTO triggers_dues VALUES('da68380de022bac727782efee3c495d4','65b404088cf2e2c5df5afb2c6d437b1d','order:42','t_late#0',1795326954648);
INSERT INTO triggers_dues VALUES('da68380de022bac727782efee3c495d4','4bbea730ef1cb59a27f55a71f68844a4','order:42','t_thank#0',1795323384699);
CREATE TABLE triggers_gates (
	gid VARCHAR(32) NOT NULL,
	sid VARCHAR(32) NOT NULL,
	uid TEXT NOT NULL,
	name TEXT NOT NULL,
	PRIMARY KEY (gid)
);
CREATE TABLE triggers_sweeps (
	id INTEGER NOT NULL,
	taken_at BIGINT NOT NULL,
	restless_until BIGINT NOT NULL,
	PRIMARY KEY (id)
);
CREATE INDEX ix_triggers_passing_until ON triggers_passing (until);
CREATE INDEX ix_triggers_dues_at ON triggers_dues (at);
CREATE INDEX ix_triggers_gates_sid ON triggers_gates (sid);
COMMIT;
